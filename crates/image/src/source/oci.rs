//! Container images on disk: OCI layouts (a directory or a tar of it) and archives of `docker save`.
//! (OCI image-spec: `image-layout.md`, `image-index.md`, `manifest.md`, `config.md`)

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use tracing::info_span;

use super::cpu_level::CpuLevel;
use super::digest::{Digest, Verified};
use super::layer::LayerMerge;
use super::store::Store;
use crate::decompress::Compression;
use crate::progress::{Progress, Step};
use crate::tree::{Spool, Tree};
use crate::{ImageError, Result};

/// More layers than any builder makes (Docker stops at 127).
const MAX_LAYERS: usize = 1000;
/// Indexes inside indexes: one level is usual.
pub(super) const MAX_NESTING: u32 = 4;

/// What a container image says about how its program is run. Empty where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `NAME=value`, in order.
    #[serde(default)]
    pub env: Vec<String>,
    /// The working directory, absolute.
    #[serde(default)]
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    #[serde(default)]
    pub user: String,
    /// The program and its first arguments.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Arguments to the entry point, or the whole command if there is none.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// The signal that asks the program to end, such as `SIGTERM`.
    #[serde(default)]
    pub stop_signal: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    media_type: String,
    pub(super) digest: String,
    #[serde(default)]
    pub(super) size: u64,
    platform: Option<Platform>,
    #[serde(default, deserialize_with = "nullable")]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    variant: String,
}

impl Platform {
    /// Whether a guest of this CPU can run it.
    fn fits(&self, wanted: Wanted<'_>) -> bool {
        self.os == "linux"
            && self.architecture == wanted.architecture
            && self.level().is_some_and(|level| level <= wanted.level)
    }

    /// The level of the instruction set that it needs; none where the variant is not a level.
    fn level(&self) -> Option<CpuLevel> {
        CpuLevel::of_variant(&self.variant)
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_str() {
            "" => Ok(()),
            variant => write!(f, "/{variant}"),
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    config: RunConfig,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "nullable")]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    #[serde(deserialize_with = "nullable")]
    env: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    working_dir: String,
    #[serde(deserialize_with = "nullable")]
    user: String,
    #[serde(deserialize_with = "nullable")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    stop_signal: String,
}

/// An image in an archive of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// Go writes empty lists and maps as `null`.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// A layer: where it is, and what it must be.
struct Layer {
    name: String,
    /// Digest and length of the stored, possibly compressed, bytes.
    stored: Option<(Digest, u64)>,
    /// Digest of the tar stream.
    diff_id: Option<Digest>,
}

/// An image ready to be merged.
pub(crate) struct OciImage {
    store: Store,
    layers: Vec<Layer>,
    pub(crate) config: ImageConfig,
}

/// Which image of several.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// A name or tag.
    pub(crate) reference: Option<&'a str>,
    /// As Go names it: `amd64`.
    pub(crate) architecture: &'a str,
    /// The best variant of the architecture that guests can run.
    pub(crate) level: CpuLevel,
}

impl OciImage {
    /// Finds the wanted image in a store and reads its descriptions; layers are read by [`OciImage::merge`].
    pub(crate) fn open(store: Store, wanted: Wanted<'_>) -> Result<Self> {
        if store.has("index.json") {
            Self::from_layout(store, wanted)
        } else if store.has("manifest.json") {
            Self::from_saved(store, wanted)
        } else {
            Err(ImageError::Unsupported {
                what: format!("{} holds no image", store.path().display()),
                advice:
                    "it must be an OCI layout (with index.json) or an archive of `docker save` \
                         (with manifest.json)"
                        .to_owned(),
            })
        }
    }

    fn from_layout(store: Store, wanted: Wanted<'_>) -> Result<Self> {
        let what = format!("index.json in {}", store.path().display());
        let mut index: Index = parse(&what, &store.read_small("index.json")?)?;
        if let Some(reference) = wanted.reference {
            index = by_reference(index, reference, &store)?;
        }
        let mut nesting = 0;
        let manifest = loop {
            let chosen = by_platform(&index, wanted, &store)?;
            let bytes = read_blob(&store, chosen)?;
            let what = format!("the manifest {}", chosen.digest);
            if !is_index(&chosen.media_type, &bytes) {
                break parse::<Manifest>(&what, &bytes)?;
            }
            nesting += 1;
            if nesting > MAX_NESTING {
                return Err(ImageError::malformed(
                    what,
                    "its indexes are nested too deep",
                ));
            }
            index = parse(&what, &bytes)?;
        };
        Self::from_manifest(store, &manifest, wanted)
    }

    /// The image of a manifest that lies in this store, known by its digest.
    #[cfg(feature = "pull")]
    pub(crate) fn by_digest(store: Store, digest: &Digest, wanted: Wanted<'_>) -> Result<Self> {
        let bytes = store.read_small(&digest.blob_path())?;
        let what = format!("the manifest {digest}");
        digest.check(&what, &bytes)?;
        Self::from_manifest(store, &parse(&what, &bytes)?, wanted)
    }

    fn from_manifest(store: Store, manifest: &Manifest, wanted: Wanted<'_>) -> Result<Self> {
        let config = read_blob(&store, &manifest.config)?;
        let what = format!("the configuration {}", manifest.config.digest);
        let config: ConfigFile =
            parse(&what, &config).map_err(|_| not_an_image(&manifest.config.media_type))?;
        let diff_ids = diff_ids(&config, manifest.layers.len(), &what)?;
        let layers = manifest
            .layers
            .iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| {
                if !layer.media_type.is_empty() && !layer.media_type.contains("tar")
                    || layer.media_type.contains("encrypted")
                {
                    return Err(not_an_image(&layer.media_type));
                }
                let digest = Digest::parse(&layer.digest)?;
                Ok(Layer {
                    name: digest.blob_path(),
                    stored: Some((digest, layer.size)),
                    diff_id,
                })
            });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self {
            layers,
            config: run_config(config, wanted, &what)?,
            store,
        })
    }

    fn from_saved(store: Store, wanted: Wanted<'_>) -> Result<Self> {
        let what = format!("manifest.json in {}", store.path().display());
        if let Store::Dir(path) = &store {
            return Err(ImageError::Unsupported {
                what: format!(
                    "{} looks like an unpacked archive of `docker save`",
                    path.display()
                ),
                advice: "give the archive itself".to_owned(),
            });
        }
        let saved: Vec<Saved> = parse(&what, &store.read_small("manifest.json")?)?;
        let fits = |image: &&Saved| {
            wanted.reference.is_none_or(|wanted| {
                image
                    .repo_tags
                    .iter()
                    .any(|tag| is_same_reference(tag, wanted))
            })
        };
        let mut fitting = saved.iter().filter(fits);
        let (image, more) = (fitting.next(), fitting.next());
        let (Some(image), None) = (image, more) else {
            let names = saved
                .iter()
                .flat_map(|image| image.repo_tags.clone())
                .collect();
            return Err(choose(&store, wanted.reference, names));
        };
        let bytes = store.read_small(&image.config)?;
        // The configuration is named by its own hash.
        let stem = image
            .config
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .trim_end_matches(".json");
        if let Some(digest) = Digest::sha256_hex(stem) {
            digest.check(&format!("the configuration {}", image.config), &bytes)?;
        }
        let config: ConfigFile = parse(&format!("the configuration {}", image.config), &bytes)?;
        let diff_ids = diff_ids(&config, image.layers.len(), &what)?;
        let layers = image.layers.iter().zip(diff_ids);
        let layers = layers
            .map(|(name, diff_id)| Layer {
                name: name.clone(),
                stored: None,
                diff_id,
            })
            .collect();
        Ok(Self {
            layers,
            config: run_config(config, wanted, &what)?,
            store,
        })
    }

    /// Merges all layers into a tree, from the lowest up, checking every digest.
    pub(crate) fn merge(
        &self,
        tree: &mut Tree,
        spool: &mut Spool,
        progress: &dyn Progress,
    ) -> Result<()> {
        for (at, layer) in self.layers.iter().enumerate() {
            let _span = info_span!("layer", number = at + 1, name = layer.name).entered();
            let (reader, stored_len) = self.store.read(&layer.name)?;
            let what = format!("layer {} of {} ({})", at + 1, self.layers.len(), layer.name);
            progress.begin(
                Step::Layer {
                    number: at + 1,
                    of: self.layers.len(),
                },
                Some(stored_len),
            );
            let (digest, len) = match &layer.stored {
                Some((digest, len)) => (Some(digest), *len),
                None => (None, stored_len),
            };
            let reader = Counted {
                inner: reader,
                progress,
            };
            let mut stored = Verified::new(reader, digest, len);
            self.merge_one(layer, tree, spool, &what, &mut stored)?;
            stored.finish(&what, digest)?;
        }
        Ok(())
    }

    fn merge_one(
        &self,
        layer: &Layer,
        tree: &mut Tree,
        spool: &mut Spool,
        what: &str,
        stored: &mut impl std::io::Read,
    ) -> Result<()> {
        use std::io::BufRead;
        let mut input = BufReader::with_capacity(1 << 18, stored);
        let damaged = |e| ImageError::malformed(what, e);
        let head = input.fill_buf().map_err(damaged)?;
        let compression = Compression::detect(head);
        let limits = tree.limits();
        // Contents and names are bounded on their own; this bounds the padding and headers around them.
        let limit = limits
            .content_bytes
            .saturating_add(limits.entries.saturating_mul(4096));
        let plain: Box<dyn std::io::Read + '_> = match compression {
            Some(compression) => compression.reader(input).map_err(damaged)?,
            None => Box::new(input),
        };
        let mut plain = Verified::new(plain, layer.diff_id.as_ref(), limit);
        LayerMerge::new(tree, spool, what).merge(&mut plain)?;
        plain.finish(&format!("the content of {what}"), layer.diff_id.as_ref())
    }
}

/// Tells progress of what is read.
struct Counted<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
}

impl<R: std::io::Read> std::io::Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.progress.advance(n as u64);
        Ok(n)
    }
}

pub(super) fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::malformed(what, e))
}

fn read_blob(store: &Store, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let digest = Digest::parse(&descriptor.digest)?;
    let bytes = store.read_small(&digest.blob_path())?;
    digest.check(&format!("the blob {digest}"), &bytes)?;
    Ok(bytes)
}

fn not_an_image(media_type: &str) -> ImageError {
    ImageError::Unsupported {
        what: format!("this is not a container image: it has a part of type {media_type:?}"),
        advice:
            "only images of tar layers (plain, gzip, zstd or xz; not encrypted) can be built from"
                .to_owned(),
    }
}

pub(super) fn is_index(media_type: &str, bytes: &[u8]) -> bool {
    let by_type = media_type.contains("index") || media_type.contains("manifest.list");
    by_type || media_type.is_empty() && serde_json::from_slice::<Index>(bytes).is_ok()
}

/// The diff ids in layer order; an image without any (made by very old tools) is checked by its blobs alone.
fn diff_ids(config: &ConfigFile, layers: usize, what: &str) -> Result<Vec<Option<Digest>>> {
    let ids = &config.rootfs.diff_ids;
    if layers > MAX_LAYERS {
        return Err(ImageError::malformed(
            what,
            format!("it has {layers} layers"),
        ));
    }
    if ids.len() != layers {
        return Err(ImageError::malformed(
            what,
            format!("it has {layers} layers but {} diff ids", ids.len()),
        ));
    }
    ids.iter().map(|id| Digest::parse(id).map(Some)).collect()
}

fn run_config(file: ConfigFile, wanted: Wanted<'_>, what: &str) -> Result<ImageConfig> {
    let named = !file.architecture.is_empty() && file.architecture != wanted.architecture;
    if named || !file.os.is_empty() && file.os != "linux" {
        return Err(ImageError::Unsupported {
            what: format!(
                "{what} is for {}/{}, not linux/{}",
                file.os, file.architecture, wanted.architecture
            ),
            advice: "pull or save the image for the right platform (docker pull --platform …)"
                .to_owned(),
        });
    }
    let RunConfig {
        env,
        working_dir,
        user,
        entrypoint,
        cmd,
        stop_signal,
    } = file.config;
    Ok(ImageConfig {
        env,
        working_dir,
        user,
        entrypoint,
        cmd,
        stop_signal,
    })
}

fn names_of(descriptor: &Descriptor) -> impl Iterator<Item = &String> {
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .iter()
    .filter_map(|key| descriptor.annotations.get(*key))
}

/// `alpine` and `docker.io/library/alpine:latest` are the same image.
fn is_same_reference(name: &str, wanted: &str) -> bool {
    fn short(name: &str) -> &str {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        let name = name.strip_prefix("library/").unwrap_or(name);
        name.strip_suffix(":latest").unwrap_or(name)
    }
    short(name) == short(wanted)
}

fn by_reference(index: Index, reference: &str, store: &Store) -> Result<Index> {
    let (fitting, rest): (Vec<_>, Vec<_>) = index.manifests.into_iter().partition(|descriptor| {
        descriptor.digest == reference
            || names_of(descriptor).any(|name| is_same_reference(name, reference))
    });
    if fitting.is_empty() {
        let names = rest.iter().flat_map(names_of).cloned().collect();
        return Err(choose(store, Some(reference), names));
    }
    Ok(Index { manifests: fitting })
}

/// The one manifest for the platform, of several variants the best that guests can run. An entry that names no
/// platform may be for any, and is known by its configuration.
pub(super) fn by_platform<'a>(
    index: &'a Index,
    wanted: Wanted<'_>,
    store: &Store,
) -> Result<&'a Descriptor> {
    let level = |d: &Descriptor| match &d.platform {
        None => Some(CpuLevel::BASE),
        Some(platform) if platform.fits(wanted) => platform.level(),
        Some(_) => None,
    };
    let fitting: Vec<(CpuLevel, &Descriptor)> = index
        .manifests
        .iter()
        .filter_map(|d| Some((level(d)?, d)))
        .collect();
    let Some(best) = fitting.iter().map(|(level, _)| *level).max() else {
        return Err(no_platform(index, wanted, store));
    };
    let mut best = fitting
        .iter()
        .filter(|(level, _)| *level == best)
        .map(|(_, d)| *d);
    let Some(first) = best.next() else {
        return Err(no_platform(index, wanted, store));
    };
    if best.any(|d| d.digest != first.digest) {
        let names = fitting
            .iter()
            .map(|(_, d)| names_of(d).next().unwrap_or(&d.digest).clone())
            .collect();
        return Err(choose(store, wanted.reference, names));
    }
    Ok(first)
}

fn no_platform(index: &Index, wanted: Wanted<'_>, store: &Store) -> ImageError {
    let mut has: Vec<String> = index
        .manifests
        .iter()
        .filter_map(|d| d.platform.as_ref())
        .map(Platform::to_string)
        .collect();
    has.dedup();
    ImageError::Unsupported {
        what: format!(
            "{} has no image for linux/{} that this CPU (level {}) can run",
            store.path().display(),
            wanted.architecture,
            wanted.level
        ),
        advice: match has.is_empty() {
            true => "it has none at all".to_owned(),
            false => format!("it has {}", has.join(", ")),
        },
    }
}

fn choose(store: &Store, reference: Option<&str>, mut names: Vec<String>) -> ImageError {
    names.sort();
    names.dedup();
    let what = match reference {
        Some(reference) => format!(
            "{} has no image, or more than one, named {reference:?}",
            store.path().display()
        ),
        None => format!("{} holds more than one image", store.path().display()),
    };
    ImageError::Unsupported {
        what,
        advice: format!("choose one by its name: {}", names.join(", ")),
    }
}

/// True if this directory is an OCI layout.
pub(crate) fn is_layout(dir: &Path) -> bool {
    dir.join("oci-layout").is_file() && dir.join("index.json").is_file()
}
