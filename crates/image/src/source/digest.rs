//! Content digests: parsing them, and checking what is read against them.
//! (OCI image-spec, `descriptor.md`)

use std::io::{self, Read};

use sha2::{Digest as _, Sha256, Sha512};

use crate::{ImageError, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
}

/// A digest such as `sha256:e3b0…`. Once parsed it is safe to be part of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex)
    }
}

impl Digest {
    /// Parses and checks the form.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let malformed = || {
            let shown: String = text.chars().take(80).collect();
            ImageError::malformed(
                format!("the digest {shown:?}"),
                "it is not sha256 or sha512 in lower-case hex",
            )
        };
        let (algorithm, length) = match text.split_once(':') {
            Some(("sha256", _)) => (Algorithm::Sha256, 64),
            Some(("sha512", _)) => (Algorithm::Sha512, 128),
            _ => return Err(malformed()),
        };
        let hex = &text[7..];
        if hex.len() != length || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(malformed());
        }
        Ok(Self {
            algorithm,
            hex: hex.to_owned(),
        })
    }

    /// The digest of this content.
    #[cfg(any(test, feature = "pull"))]
    pub(crate) fn sha256(bytes: &[u8]) -> Self {
        Self {
            algorithm: Algorithm::Sha256,
            hex: hex(&Sha256::digest(bytes)),
        }
    }

    /// A SHA-256 digest from its 64 hex digits, if these are that.
    pub(crate) fn sha256_hex(hex: &str) -> Option<Self> {
        Self::parse(&format!("sha256:{hex}")).ok()
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Where an OCI layout keeps the blob.
    pub(crate) fn blob_path(&self) -> String {
        format!("blobs/{}/{}", self.algorithm(), self.hex)
    }

    /// Checks bytes held in memory.
    pub(crate) fn check(&self, what: &str, bytes: &[u8]) -> Result<()> {
        let mut hasher = Hasher::new(self);
        hasher.update(bytes);
        hasher.check(what, self)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A running hash of the algorithm that a digest uses.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn new(digest: &Digest) -> Self {
        match digest.algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Compares with the digest it was made for.
    pub(crate) fn check(self, what: &str, digest: &Digest) -> Result<()> {
        let (algorithm, found) = match self {
            Self::Sha256(hasher) => ("sha256", hex(&hasher.finalize())),
            Self::Sha512(hasher) => ("sha512", hex(&hasher.finalize())),
        };
        if found == digest.hex {
            return Ok(());
        }
        Err(ImageError::Digest {
            what: what.to_owned(),
            expected: digest.to_string(),
            found: format!("{algorithm}:{found}"),
        })
    }
}

/// Hashes what is read through it, and refuses to read beyond a limit.
pub(crate) struct Verified<R> {
    inner: R,
    hasher: Option<Hasher>,
    left: u64,
}

impl<R: Read> Verified<R> {
    /// At most `limit` bytes may come; with no digest, only the length is watched.
    pub(crate) fn new(inner: R, digest: Option<&Digest>, limit: u64) -> Self {
        Self {
            inner,
            hasher: digest.map(Hasher::new),
            left: limit,
        }
    }

    /// Reads what is left, then compares.
    pub(crate) fn finish(mut self, what: &str, digest: Option<&Digest>) -> Result<()> {
        io::copy(&mut self, &mut io::sink()).map_err(|e| ImageError::malformed(what, e))?;
        match (self.hasher, digest) {
            (Some(hasher), Some(digest)) => hasher.check(what, digest),
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "it is longer than it says, or than the limit allows",
            )
        })?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..n]);
        }
        Ok(n)
    }
}
