//! The levels of the x86-64 instruction set, which container images have as variants of `amd64`: `v1` to `v4`.
//!
//! Source: x86-64 psABI, "Micro-Architecture Levels"; OCI image-spec, `image-index.md`, "Platform Variants".

use std::fmt;

/// A level of the instruction set; each has the ones below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CpuLevel(u8);

impl CpuLevel {
    /// What every x86-64 CPU has.
    pub(crate) const BASE: Self = Self(1);

    /// The level that a variant of `amd64` needs; `None` for a name that is not a level.
    pub(crate) fn of_variant(variant: &str) -> Option<Self> {
        match variant {
            "" | "v1" => Some(Self::BASE),
            "v2" => Some(Self(2)),
            "v3" => Some(Self(3)),
            "v4" => Some(Self(4)),
            _ => None,
        }
    }

    /// The level of this host's CPU, which is the one that guests see.
    pub(crate) fn of_host() -> Self {
        let levels = [has_v2(), has_v3(), has_v4()];
        let reached = levels.iter().take_while(|has| **has).count();
        Self(1 + reached as u8)
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

fn has_v2() -> bool {
    is_x86_feature_detected!("cmpxchg16b")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("sse3")
        && is_x86_feature_detected!("ssse3")
        && is_x86_feature_detected!("sse4.1")
        && is_x86_feature_detected!("sse4.2")
}

fn has_v3() -> bool {
    is_x86_feature_detected!("avx")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe")
}

fn has_v4() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}
