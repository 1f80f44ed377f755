//! `army cp`, and reading and writing files of this host.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use army_api::client::{ClientError, segment};
use army_api::exec::FilePath;
use clone_cli::FileSink;
use futures_util::{Stream, StreamExt};

use super::context::Context;

/// The permissions of files that are created on this host.
const NEW_FILE_MODE: u32 = 0o644;

/// Copy a file into or out of a VM: one side is VM:PATH.
///
/// In a directory the file keeps its name. Data can be copied into devices and pipes of this host;
/// in a VM they are refused.
#[derive(clap::Args)]
pub(super) struct CopyArgs {
    /// The source.
    from: OsString,
    /// The destination.
    to: OsString,
    /// Permissions of the file in the VM, as in 755; by default, those of the local file.
    #[arg(long)]
    mode: Option<String>,
}

pub(super) async fn copy(context: &Context, args: CopyArgs) -> Result<ExitCode> {
    let client = context.client()?;
    match (inside(&args.from), inside(&args.to)) {
        (Some((vm, path)), None) => {
            let file = FilePath {
                path: path.to_owned(),
                ..FilePath::default()
            };
            let pieces = client
                .bytes(&format!("/v1/vms/{}/files", segment(vm)), &file)
                .await?;
            receive(pieces, &landing(path, Path::new(&args.to))).await?;
        }
        (None, Some((vm, path))) => {
            let from = Path::new(&args.from);
            let body = open(from).await?;
            // File names in a guest are sent as text.
            let own = from.file_name().and_then(OsStr::to_str);
            let file = FilePath {
                // As with cp, a file that is copied into a directory keeps its name.
                path: match own {
                    Some(own) if path.ends_with('/') => format!("{path}{own}"),
                    _ => path.to_owned(),
                },
                mode: args.mode.or_else(|| mode_of(from)),
                name: own.map(str::to_owned),
            };
            client
                .put_bytes(&format!("/v1/vms/{}/files", segment(vm)), &file, body)
                .await?;
        }
        _ => {
            bail!("one of the two is a file in a VM, written as VM:PATH, and the other one is not")
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A file's permissions in the API's form.
fn mode_of(path: &Path) -> Option<String> {
    let about = std::fs::metadata(path).ok().filter(|it| it.is_file())?;
    Some(format!("{:o}", about.permissions().mode() & 0o7777))
}

/// The path of the copy of a VM's file: in a directory it keeps its name.
fn landing(path: &str, target: &Path) -> PathBuf {
    match Path::new(path).file_name() {
        Some(own) if target.is_dir() => target.join(own),
        _ => target.to_owned(),
    }
}

/// Writes the content to `target`. A file appears as a whole or not at all; a device or a pipe is
/// written to.
pub(super) async fn receive(
    pieces: impl Stream<Item = Result<Vec<u8>, ClientError>>,
    target: &Path,
) -> Result<()> {
    let failed = || format!("cannot write {}", target.display());
    let mut pieces = std::pin::pin!(pieces);
    let mut sink = FileSink::open(target).with_context(failed)?;
    while let Some(piece) = pieces.next().await {
        sink.write_all(&piece?).with_context(failed)?;
    }
    sink.keep(NEW_FILE_MODE).with_context(failed)
}

/// The file at `path` as the body of a request. It is read while it is sent.
pub(super) async fn open(path: &Path) -> Result<reqwest::Body> {
    let file = tokio::fs::File::open(path).await;
    let file = file.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(file.into())
}

/// The VM and the path of `VM:/path` or `TENANT/VM:/path`. An argument that is not text is a file of
/// this host.
pub(super) fn inside(text: &OsStr) -> Option<(&str, &str)> {
    let (vm, path) = text.to_str()?.split_once(':')?;
    let (tenant, name) = vm.split_once('/').unzip();
    let mut names = [tenant, Some(name.unwrap_or(vm))].into_iter().flatten();
    (names.all(clone_api::validate::is_valid_name) && path.starts_with('/')).then_some((vm, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_a_vm_is_named_with_its_vm_and_its_tenant_where_that_is_another() {
        for (text, expected) in [
            ("anna:/x", Some(("anna", "/x"))),
            ("red/anna:/x", Some(("red/anna", "/x"))),
            ("./anna:/x", None),
            ("/red/anna:/x", None),
            ("a/b/c:/x", None),
            ("anna:x", None),
        ] {
            assert_eq!(inside(OsStr::new(text)), expected, "{text}");
        }
    }
    use std::os::unix::ffi::OsStrExt;

    #[tokio::test]
    async fn a_file_lands_in_a_directory_and_a_pipe_stays_one() {
        use std::os::unix::fs::FileTypeExt;
        let folder = tempfile::tempdir().unwrap();
        let pieces = || futures_util::stream::iter([Ok(b"new".to_vec())]);
        let target = landing("/etc/hosts", folder.path());
        receive(pieces(), &target).await.unwrap();
        assert_eq!(std::fs::read(folder.path().join("hosts")).unwrap(), b"new");
        assert_eq!(mode_of(&target).unwrap(), "644");
        receive(pieces(), Path::new("/dev/null")).await.unwrap();
        let null = std::fs::metadata("/dev/null").unwrap();
        assert!(null.file_type().is_char_device());
        let cut = futures_util::stream::iter([
            Ok(b"half".to_vec()),
            Err(ClientError::Unreachable {
                url: "here".into(),
                cause: "cut off".into(),
            }),
        ]);
        receive(cut, &target).await.unwrap_err();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_in_a_vm_is_distinguished_from_a_file_of_this_host() {
        assert_eq!(inside(OsStr::new("a:/etc/x")), Some(("a", "/etc/x")));
        assert_eq!(inside(OsStr::new("a:/b:/c")), Some(("a", "/b:/c")));
        for text in [&b"/a:/b"[..], b"a:b", b"./a", b"a", b"./a:/b", b"a:/n\xff"] {
            assert_eq!(inside(OsStr::from_bytes(text)), None, "{text:?}");
        }
    }
}
