//! Root file systems: from a source to a bootable disk image.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tracing::info_span;

use crate::ext4::{self, DiskSize};
use crate::guest::{self, FoundInit, Init, Outfit};
use crate::progress::Progress;
use crate::source::cpu_level::CpuLevel;
use crate::source::oci::{self, OciImage, Wanted};
use crate::source::store::Store;
use crate::source::{Debian, ImageConfig, Ownership, debian, directory};
#[cfg(feature = "pull")]
use crate::source::{RegistryImage, pull};
use crate::staging::Staging;
use crate::tree::{Limits, Spool, Tree};
use crate::{ImageError, Result};

/// The architecture of guests, as image manifests name it.
const ARCHITECTURE: &str = "amd64";

/// Where the files come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Source {
    /// A Debian suite, installed by mmdebstrap.
    Debian(Debian),
    /// A directory of the host.
    Directory {
        /// Its path.
        path: PathBuf,
        /// Whose its files become.
        ownership: Ownership,
    },
    /// An OCI image layout (a directory, or a tar of one) or an archive of `docker save`, compressed or not.
    Image {
        /// Its path.
        path: PathBuf,
        /// Which image, where it holds several: a tag, name or digest.
        reference: Option<String>,
    },
    /// An image in a registry.
    #[cfg(feature = "pull")]
    Registry(RegistryImage),
}

impl Source {
    /// Tells what a path of the host is: an image layout, an archive of an image, or a plain directory.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let meta = std::fs::metadata(&path).map_err(ImageError::io("open", &path))?;
        Ok(if meta.is_dir() && !oci::is_layout(&path) {
            Self::Directory {
                path,
                ownership: Ownership::Keep,
            }
        } else {
            Self::Image {
                path,
                reference: None,
            }
        })
    }

    /// A line for people.
    fn describe(&self) -> String {
        match self {
            Self::Debian(debian) => format!("Debian {}", debian.suite),
            Self::Directory { path, .. } => format!("directory {}", path.display()),
            #[cfg(feature = "pull")]
            Self::Registry(image) => format!("image {}", image.reference),
            Self::Image {
                path,
                reference: None,
            } => format!("image {}", path.display()),
            Self::Image {
                path,
                reference: Some(name),
            } => format!("image {name} in {}", path.display()),
        }
    }
}

/// What to build. Start from [`RootfsSpec::new`] and change what you need.
#[derive(Clone, Debug)]
pub struct RootfsSpec {
    /// Where the files come from.
    pub source: Source,
    /// The disk image to make.
    pub output: PathBuf,
    /// Replace an `output` that exists.
    pub replace: bool,
    /// The disk's size.
    pub size: DiskSize,
    /// A static `clone-agent` for the guest.
    pub agent: Option<PathBuf>,
    /// What is to be PID 1.
    pub init: Init,
    /// The guest's host name.
    pub hostname: String,
    /// Written to the guest's `/etc/resolv.conf`, if there are any.
    pub nameservers: Vec<IpAddr>,
    /// The file system's label, at most 16 bytes.
    pub label: String,
    /// The file system's UUID; a random one if not given.
    pub uuid: Option<[u8; 16]>,
    /// The time that generated files and the file system carry, in seconds since 1970; now if not given. With this
    /// and `uuid` given, the same input makes the same bytes.
    pub created: Option<u64>,
    /// How much the source may hold.
    pub limits: Limits,
}

impl RootfsSpec {
    /// Builds `output` from `source`, with defaults for the rest.
    pub fn new(source: Source, output: impl Into<PathBuf>) -> Self {
        Self {
            source,
            output: output.into(),
            replace: false,
            size: DiskSize::default(),
            agent: None,
            init: Init::Auto,
            hostname: "clone".to_owned(),
            nameservers: Vec::new(),
            label: "clone-root".to_owned(),
            uuid: None,
            created: None,
            limits: Limits::default(),
        }
    }
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RootfsReport {
    /// The disk image.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Its size in bytes; it is sparse and takes less.
    pub bytes: u64,
    /// Files, directories and other nodes in it.
    pub inodes: u64,
    /// What PID 1 is.
    pub init: FoundInit,
    /// How a container image's program is to be run.
    pub config: ImageConfig,
    /// Mount points of other file systems below a source directory: they are in the image, what is mounted on them is
    /// not.
    #[serde(serialize_with = "all_as_text", skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<PathBuf>,
}

/// A path as text. JSON knows no other bytes: what is not UTF-8 is replaced.
fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn all_as_text<S: serde::Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

/// Builds a root file system as a sparse raw ext4 disk.
///
/// Needs no privilege. The output appears when it is complete; a failed build leaves nothing behind.
///
/// # Errors
/// See [`ImageError`]; every message names the source's part that is wrong.
pub fn build_rootfs(spec: &RootfsSpec, progress: &dyn Progress) -> Result<RootfsReport> {
    let _span = info_span!("rootfs_build", source = %spec.source.describe(), output = %spec.output.display()).entered();
    let staging = Staging::create(&spec.output, spec.replace)?;
    let created = spec
        .created
        .unwrap_or_else(|| clone_base::clock::since_1970().as_secs());
    let mut tree = Tree::new(spec.limits);
    let mut spool = Spool::new(staging.dir(), spec.limits.content_bytes)?;
    let Filled { config, left_out } = fill(&mut tree, &mut spool, spec, staging.dir(), progress)?;
    let init = guest::fit_out(
        &mut tree,
        &Outfit {
            agent: spec.agent.as_deref(),
            init: spec.init,
            hostname: &spec.hostname,
            nameservers: &spec.nameservers,
            label: &spec.label,
            source: spec.source.describe(),
            config: config.clone(),
            created: i64::try_from(created).unwrap_or(i64::MAX),
        },
    )?;
    let uuid = match spec.uuid {
        Some(uuid) => uuid,
        None => random_uuid()?,
    };
    let options = ext4::Options {
        size: spec.size,
        uuid,
        label: spec.label.clone(),
        created,
    };
    let made = ext4::write(&tree, &options, staging.file(), staging.target(), progress)?;
    staging.commit(spec.replace)?;
    Ok(RootfsReport {
        path: spec.output.clone(),
        bytes: made.bytes,
        inodes: made.inodes,
        init,
        config,
        left_out,
    })
}

/// What a source says beside its files.
#[derive(Default)]
struct Filled {
    config: ImageConfig,
    left_out: Vec<PathBuf>,
}

impl From<ImageConfig> for Filled {
    fn from(config: ImageConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

fn fill(
    tree: &mut Tree,
    spool: &mut Spool,
    spec: &RootfsSpec,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Filled> {
    match &spec.source {
        Source::Debian(debian) => {
            debian::install(debian, tree, spool, progress)?;
            Ok(Filled::default())
        }
        Source::Directory { path, ownership } => {
            let left_out = directory::read(tree, path, *ownership, progress)?;
            Ok(Filled {
                left_out,
                ..Filled::default()
            })
        }
        #[cfg(feature = "pull")]
        Source::Registry(image) => {
            let wanted = Wanted {
                reference: None,
                architecture: ARCHITECTURE,
                level: CpuLevel::of_host(),
            };
            let digest = pull::pull(image, wanted, spec.limits.content_bytes, progress)?;
            let image = OciImage::by_digest(Store::Dir(image.blobs.clone()), &digest, wanted)?;
            image.merge(tree, spool, progress)?;
            Ok(image.config.into())
        }
        Source::Image { path, reference } => {
            let store = Store::open(path, scratch, spec.limits.content_bytes)?;
            let wanted = Wanted {
                reference: reference.as_deref(),
                architecture: ARCHITECTURE,
                level: CpuLevel::of_host(),
            };
            let image = OciImage::open(store, wanted)?;
            image.merge(tree, spool, progress)?;
            Ok(image.config.into())
        }
    }
}

/// A random UUID (version 4, RFC 9562).
fn random_uuid() -> Result<[u8; 16]> {
    let random = clone_base::random::bytes::<16>();
    let mut uuid = random.map_err(ImageError::io("read random bytes for", "a UUID"))?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
