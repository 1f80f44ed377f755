//! Opens KVM on this host, and compares the CPU features that it offers with those that a template
//! needs.

use clone_api::control::CpuFeatures;
use clone_api::{ApiError, ErrorCode};
use clone_vmm::snapshot::{CpuProfile, Mismatch};
use kvm_ioctls::Kvm;

use crate::error::Result;

/// Opens `/dev/kvm`; the error has advice for each kind of failure.
pub fn open_kvm() -> Result<Kvm> {
    Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOENT => {
                "load the module kvm_intel or kvm_amd; inside a VM, switch on nested virtualization"
            }
            libc::EACCES | libc::EPERM => {
                "join the group that owns /dev/kvm (often `kvm`), or run as root"
            }
            _ => "see the kernel's log (dmesg) for kvm",
        };
        ApiError::new(
            ErrorCode::HostUnsupported,
            format!("cannot open /dev/kvm: {error}"),
        )
        .advise(advice)
    })
}

/// The features that a boot on this host gives a guest.
///
/// # Errors
/// `/dev/kvm` cannot be opened; the error has advice.
pub fn of_host() -> Result<CpuFeatures> {
    let profile = CpuProfile::of_host(&open_kvm()?);
    let profile = profile.map_err(|error| ApiError::internal(&error))?;
    Ok(features_of(profile))
}

/// A profile as the API and manifests write it.
pub fn features_of(profile: CpuProfile) -> CpuFeatures {
    CpuFeatures {
        vendor: profile.vendor,
        features: profile.features,
    }
}

/// The features that `needed` has and `host` lacks, as in `avx512f (7.ebx bit 16)`; empty if the
/// host can run the template, as far as the template says what it needs.
pub fn missing(needed: &CpuFeatures, host: &CpuFeatures) -> Vec<String> {
    let profile = |features: &CpuFeatures| CpuProfile {
        vendor: features.vendor.clone(),
        features: features.features.clone(),
    };
    if *needed == CpuFeatures::default() {
        return Vec::new();
    }
    match profile(host).can_run(&profile(needed)) {
        Ok(()) => Vec::new(),
        Err(Mismatch::Vendor { saved, .. }) => vec![format!("a CPU of {saved}")],
        Err(Mismatch::Features(features)) => features,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(vendor: &str, leaf_7: u32) -> CpuFeatures {
        CpuFeatures {
            vendor: vendor.to_owned(),
            features: [("7.ebx".to_owned(), leaf_7)].into(),
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let template = features("AuthenticAMD", 1 << 16 | 1 << 5);
        let missing_on = |vendor, leaf_7| missing(&template, &features(vendor, leaf_7));
        assert!(missing_on("AuthenticAMD", u32::MAX).is_empty());
        assert!(missing(&CpuFeatures::default(), &template).is_empty());
        assert_eq!(
            missing_on("AuthenticAMD", 1 << 5),
            ["avx512f (7.ebx bit 16)"]
        );
        assert_eq!(
            missing_on("GenuineIntel", u32::MAX),
            ["a CPU of AuthenticAMD"]
        );
    }

    /// A profile from a manifest of the first version that had one. This format must stay readable.
    const OLD_MANIFEST_CPU: &str = r#"{"vendor":"AuthenticAMD","features":{"1.ecx":4160377347,
        "1.edx":126614527,"7.ebx":563873705,"7.ecx":4,"7.edx":2147483648,"80000001.ecx":1073743859,
        "80000001.edx":769915903,"d.1.eax":15}}"#;

    #[test]
    fn the_cpu_of_an_old_manifest_is_still_read_and_compared() {
        let old: CpuFeatures = serde_json::from_str(OLD_MANIFEST_CPU).unwrap();
        assert_eq!(old.features.len(), 8);
        let mut host = old.clone();
        host.features.insert("7.1.eax".to_owned(), 1 << 5);
        assert!(missing(&old, &host).is_empty());
        host.features.insert("7.ebx".to_owned(), 0);
        assert!(missing(&old, &host).contains(&"avx2 (7.ebx bit 5)".to_owned()));
    }

    #[test]
    fn a_template_of_a_version_that_knew_fewer_words_is_compared_by_those() {
        let mut host = features("AuthenticAMD", 1);
        host.features.insert("80000008.ebx".to_owned(), 5);
        assert!(missing(&features("AuthenticAMD", 1), &host).is_empty());
        let more = missing(&host, &features("AuthenticAMD", 1));
        assert_eq!(
            more,
            [
                "clzero (80000008.ebx bit 0)",
                "xsaveerptr (80000008.ebx bit 2)"
            ]
        );
    }
}
