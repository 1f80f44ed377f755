//! `army cp`, and files that are read and written here.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use army_api::client::{ClientError, segment};
use army_api::exec::FilePath;
use futures_util::{Stream, StreamExt};

use super::context::Context;

/// Copy a file into or out of a VM: one side is VM:PATH.
#[derive(clap::Args)]
pub(super) struct CopyArgs {
    /// What is copied.
    from: OsString,
    /// Where to.
    to: OsString,
    /// Permissions of a new file in the VM, as in 755.
    #[arg(long)]
    mode: Option<String>,
}

pub(super) async fn copy(context: &Context, args: CopyArgs) -> Result<ExitCode> {
    let client = context.client()?;
    let file = |path: &str| FilePath {
        path: path.to_owned(),
        mode: args.mode.clone(),
    };
    match (inside(&args.from), inside(&args.to)) {
        (Some((vm, path)), None) => {
            let pieces = client
                .bytes(&format!("/v1/vms/{}/files", segment(&vm)), &file(path))
                .await?;
            receive(pieces, Path::new(&args.to)).await?;
        }
        (None, Some((vm, path))) => {
            let body = open(Path::new(&args.from)).await?;
            client
                .put_bytes(
                    &format!("/v1/vms/{}/files", segment(&vm)),
                    &file(path),
                    body,
                )
                .await?;
        }
        _ => {
            bail!("one of the two is a file in a VM, written as VM:PATH, and the other one is not")
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes what comes to `target`, which appears whole or not at all.
pub(super) async fn receive(
    pieces: impl Stream<Item = Result<Vec<u8>, ClientError>>,
    target: &Path,
) -> Result<()> {
    let mut name = target.as_os_str().to_owned();
    name.push(".part");
    let part = Path::new(&name);
    let failed = || format!("cannot write {}", target.display());
    let mut pieces = std::pin::pin!(pieces);
    let mut out = File::create(part).with_context(failed)?;
    let mut write = async || -> Result<()> {
        while let Some(piece) = pieces.next().await {
            out.write_all(&piece?).with_context(failed)?;
        }
        std::fs::rename(part, target).with_context(failed)
    };
    let written = write().await;
    if written.is_err() {
        let _ = std::fs::remove_file(part);
    }
    written
}

/// The file at `path` as a request's body, read as it is sent.
pub(super) async fn open(path: &Path) -> Result<reqwest::Body> {
    let file = tokio::fs::File::open(path).await;
    let file = file.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(file.into())
}

/// The VM and the path of `VM:/path`; what is not text is a file here.
fn inside(text: &OsStr) -> Option<(&str, &str)> {
    let (vm, path) = text.to_str()?.split_once(':')?;
    (clone_api::validate::is_valid_name(vm) && path.starts_with('/')).then_some((vm, path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_file_in_a_vm_is_told_from_one_that_is_not() {
        assert_eq!(inside(OsStr::new("a:/etc/x")), Some(("a", "/etc/x")));
        assert_eq!(inside(OsStr::new("a:/b:/c")), Some(("a", "/b:/c")));
        for text in [&b"/a:/b"[..], b"a:b", b"./a", b"a", b"./a:/b", b"a:/n\xff"] {
            assert_eq!(inside(OsStr::from_bytes(text)), None, "{text:?}");
        }
    }
}
