//! Pulls an image from a registry into a directory of blobs, from which it is then built like an OCI layout.
//! (OCI distribution-spec, "Pull")
//!
//! Blobs are kept by digest: a second pull fetches only what is new. The registry is not trusted: what it sends is
//! bounded, checked against its digest, and takes its place only when it is whole. The async runtime lives and ends
//! inside [`pull`].

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tracing::{debug, info_span, warn};

use super::digest::{Digest, Hasher, Verified};
use super::oci::{Descriptor, MAX_NESTING, Manifest, Wanted, by_platform, is_index, parse};
use super::store::Store;
use crate::progress::{Progress, Step};
use crate::{ImageError, Result};

const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// The time after which a registry that sends nothing is considered dead.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);
/// The number of attempts to fetch a blob.
const ATTEMPTS: u32 = 3;

/// Who asks.
#[derive(Clone, Default)]
pub enum Credentials {
    /// No credentials are sent.
    #[default]
    Anonymous,
    /// A user with a password or token.
    Basic {
        /// The user's name.
        user: String,
        /// The password or access token.
        password: String,
    },
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { user, .. } => write!(f, "Basic({user}, …)"),
        }
    }
}

/// An image in a registry.
#[derive(Clone, Debug)]
pub struct RegistryImage {
    /// Such as `alpine`, `registry.example/owner/name:tag` or `name@sha256:…`.
    pub reference: String,
    /// The directory that blobs are kept in; it may serve any number of images and builds at once.
    pub blobs: std::path::PathBuf,
    /// Who asks.
    pub credentials: Credentials,
    /// Speak plain HTTP: for registries on this host or a private network.
    pub plain_http: bool,
}

struct Pull<'a> {
    client: Client,
    image: Reference,
    auth: RegistryAuth,
    blobs: &'a Path,
    /// Bytes that all layers together may have.
    budget: u64,
    progress: &'a dyn Progress,
}

/// Fetches an image's manifest, configuration and layers; returns the manifest's digest.
pub(crate) fn pull(
    from: &RegistryImage,
    wanted: Wanted<'_>,
    limit: u64,
    progress: &dyn Progress,
) -> Result<Digest> {
    let _span = info_span!("pull", reference = from.reference).entered();
    let image: Reference = from
        .reference
        .parse()
        .map_err(|e| ImageError::Unsupported {
            what: format!("{:?} is no image reference: {e}", from.reference),
            advice: "write it as NAME, NAME:TAG, REGISTRY/NAME:TAG or NAME@sha256:DIGEST"
                .to_owned(),
        })?;
    fs::create_dir_all(&from.blobs).map_err(ImageError::io("create the directory", &from.blobs))?;
    // Another part of the program may have chosen a provider already: then that one serves.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = ClientConfig {
        protocol: if from.plain_http {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        platform_resolver: None,
        connect_timeout: Some(CONNECT),
        read_timeout: Some(SILENCE),
        ..ClientConfig::default()
    };
    let auth = match &from.credentials {
        Credentials::Anonymous => RegistryAuth::Anonymous,
        Credentials::Basic { user, password } => {
            RegistryAuth::Basic(user.clone(), password.clone())
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ImageError::io(
            "start the network runtime for",
            &from.reference,
        ))?;
    let pull = Pull {
        client: Client::new(config),
        image,
        auth,
        blobs: &from.blobs,
        budget: limit,
        progress,
    };
    runtime.block_on(pull.run(wanted))
}

impl Pull<'_> {
    async fn run(mut self, wanted: Wanted<'_>) -> Result<Digest> {
        let store = Store::Dir(self.blobs.to_owned());
        let mut image = self.image.clone();
        for _ in 0..=MAX_NESTING {
            let (bytes, digest) = self.manifest(&image).await?;
            let what = format!("the manifest {digest} of {}", self.image);
            if !is_index("", &bytes) {
                let manifest: Manifest = parse(&what, &bytes)?;
                self.blob(&manifest.config).await?;
                for layer in &manifest.layers {
                    self.blob(layer).await?;
                }
                return Ok(digest);
            }
            let index = parse(&what, &bytes)?;
            let chosen = by_platform(&index, wanted, &store)?;
            image = self
                .image
                .clone_with_digest(Digest::parse(&chosen.digest)?.to_string());
        }
        Err(ImageError::malformed(
            self.image.to_string(),
            "its indexes are nested too deep",
        ))
    }

    /// Fetches a manifest or index, checks it against the reference's digest if it has one, and keeps it.
    async fn manifest(&self, image: &Reference) -> Result<(Vec<u8>, Digest)> {
        let answer = self
            .client
            .pull_manifest_raw(image, &self.auth, &MANIFEST_TYPES)
            .await;
        let (bytes, _) = answer.map_err(|e| self.failed("the manifest", &e))?;
        let digest = match image.digest() {
            Some(digest) => Digest::parse(digest)?,
            None => Digest::sha256(&bytes),
        };
        digest.check(&format!("the manifest of {image}"), &bytes)?;
        let mut file = self.temporary()?;
        file.write_all(&bytes)
            .map_err(ImageError::io("write", file.path()))?;
        self.keep(file, &digest)?;
        Ok((bytes.to_vec(), digest))
    }

    /// Fetches a blob unless it is there already, whole.
    async fn blob(&mut self, descriptor: &Descriptor) -> Result<()> {
        let digest = Digest::parse(&descriptor.digest)?;
        self.budget =
            self.budget
                .checked_sub(descriptor.size)
                .ok_or_else(|| ImageError::Limit {
                    what: format!("the size of {}", self.image),
                    limit: "the bytes that are left for it".to_owned(),
                    advice: "check the reference, or raise the limit",
                })?;
        if self.has(&digest, descriptor.size) {
            debug!(%digest, "the blob is here already");
            return Ok(());
        }
        let mut attempt = 1;
        loop {
            self.progress.begin(
                Step::Fetch {
                    digest: digest.to_string(),
                },
                Some(descriptor.size),
            );
            match self.fetch(&digest, descriptor.size).await {
                Err(error @ ImageError::Registry { .. }) if attempt < ATTEMPTS => {
                    warn!(%digest, attempt, %error, "fetching it again");
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    fn has(&self, digest: &Digest, size: u64) -> bool {
        let Ok(file) = File::open(self.blobs.join(digest.blob_path())) else {
            return false;
        };
        let whole = file
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.len() == size);
        whole
            && Verified::new(file, Some(digest), size)
                .finish("the blob", Some(digest))
                .is_ok()
    }

    async fn fetch(&self, digest: &Digest, size: u64) -> Result<()> {
        let what = format!("the blob {digest}");
        let name = digest.to_string();
        let answer = self
            .client
            .pull_blob_stream(&self.image, name.as_str())
            .await;
        let mut stream = answer.map_err(|e| self.failed(&what, &e))?.stream;
        let mut file = self.temporary()?;
        let mut hasher = Hasher::new(digest);
        let mut left = size;
        while let Some(part) = stream.next().await {
            let part = part.map_err(|e| self.failed(&what, &e.into()))?;
            left = left.checked_sub(part.len() as u64).ok_or_else(|| {
                ImageError::malformed(
                    &what,
                    format!("it is longer than the {size} bytes it should have"),
                )
            })?;
            hasher.update(&part);
            file.write_all(&part)
                .map_err(ImageError::io("write", file.path()))?;
            self.progress.advance(part.len() as u64);
        }
        if left > 0 {
            return Err(self.failed(
                &what,
                &OciDistributionError::GenericError(Some(format!("{left} bytes are missing"))),
            ));
        }
        hasher.check(&what, digest)?;
        self.keep(file, digest)
    }

    fn temporary(&self) -> Result<tempfile::NamedTempFile> {
        tempfile::Builder::new()
            .prefix(".fetch-")
            .tempfile_in(self.blobs)
            .map_err(ImageError::io("create a temporary file in", self.blobs))
    }

    fn keep(&self, file: tempfile::NamedTempFile, digest: &Digest) -> Result<()> {
        let path = self.blobs.join(digest.blob_path());
        let dir = path.parent().unwrap_or(self.blobs);
        fs::create_dir_all(dir).map_err(ImageError::io("create the directory", dir))?;
        file.as_file()
            .sync_data()
            .map_err(ImageError::io("sync", file.path()))?;
        file.persist(&path)
            .map_err(|e| ImageError::io("put in place", &path)(e.error))?;
        Ok(())
    }

    fn failed(&self, what: &str, error: &OciDistributionError) -> ImageError {
        let advice = match error {
            OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::UnauthorizedError { .. } => {
                "log in, or check the name: registries hide what they do not have behind this answer"
            }
            OciDistributionError::ImageManifestNotFoundError(_) => "check the name and the tag",
            OciDistributionError::RequestError(_) => "check the registry's name and the network",
            _ => "check the reference, and try again later",
        };
        let mut detail = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            detail = format!("{detail}: {cause}");
            source = cause.source();
        }
        ImageError::Registry {
            what: format!("{what} of {}", self.image),
            detail,
            advice,
        }
    }
}
