//! `army file`: directories and files in VMs.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use agent_proto::text::printable;
use anyhow::{Context as _, Result};
use army_api::client::segment;
use army_api::files::{
    ArchivePath, FileChange, FileEntry, FilePage, ListFiles, MakeDirectory, RemoveFile, RenameFile,
    StatFile, WatchFiles,
};
use futures_util::StreamExt;

use super::context::Context;
use super::files::{inside, open, receive};
use super::output::{bytes, table, word};

/// Manage files in a VM.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// List a directory.
    Ls {
        /// The directory, VM:PATH.
        path: OsString,
    },
    /// Show facts about a file.
    Stat {
        /// The file, VM:PATH.
        path: OsString,
        /// Show the file at the end of links, rather than the link.
        #[arg(long, short = 'L')]
        follow: bool,
    },
    /// Make a directory.
    Mkdir {
        /// The directory, VM:PATH.
        path: OsString,
        /// Make directories above it, too; one that exists is no error.
        #[arg(long, short)]
        parents: bool,
        /// Its permissions, as in 750.
        #[arg(long, short)]
        mode: Option<String>,
        /// Its owner, a name or a number; root by default.
        #[arg(long, short)]
        user: Option<String>,
    },
    /// Remove a file or a directory.
    Rm {
        /// The file, VM:PATH. A link is removed, and not what it leads to.
        path: OsString,
        /// Remove a directory with its content.
        #[arg(long, short)]
        recursive: bool,
    },
    /// Rename a file or a directory.
    Mv {
        /// The file, VM:PATH.
        from: OsString,
        /// The new path in the same VM.
        to: String,
        /// Replace a file that is there already.
        #[arg(long, short)]
        force: bool,
    },
    /// Read a directory as a tar archive.
    Pack {
        /// The directory, VM:PATH.
        path: OsString,
        /// The archive, a file of this host.
        archive: PathBuf,
    },
    /// Unpack a tar archive into a directory.
    Unpack {
        /// The archive, a file of this host.
        archive: PathBuf,
        /// The directory, VM:PATH.
        path: OsString,
        /// The owner of all files, a name or a number; by default, the numbers in the archive.
        #[arg(long, short)]
        user: Option<String>,
    },
    /// Print changes of files as they happen.
    Watch {
        /// The directory or file, VM:PATH.
        path: OsString,
        /// Watch directories in it, too.
        #[arg(long, short)]
        recursive: bool,
    },
}

/// The path of a request about files in `vm`, and the path in the guest.
fn place(text: &OsString, what: &str) -> Result<(String, String)> {
    let (vm, path) = inside(text)
        .with_context(|| format!("{} is not VM:PATH, as in web:/srv", text.display()))?;
    let request = format!("/v1/vms/{}/files{what}", segment(vm));
    Ok((request, path.to_owned()))
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode> {
    let client = context.client()?;
    match command {
        Command::Ls { path } => {
            let (url, path) = place(&path, "/list")?;
            let mut request = ListFiles {
                path,
                ..ListFiles::default()
            };
            let mut entries = Vec::new();
            loop {
                let page: FilePage = client.get(&url, &request).await?;
                entries.extend(page.entries);
                request.after = page.next;
                if request.after.is_none() {
                    break;
                }
            }
            context.show(&entries, |entries| entries_table(entries))?;
        }
        Command::Stat { path, follow } => {
            let (url, path) = place(&path, "/stat")?;
            let entry: FileEntry = client.get(&url, &StatFile { path, follow }).await?;
            context.show(&entry, |it| entries_table(std::slice::from_ref(it)))?;
        }
        Command::Mkdir {
            path,
            parents,
            mode,
            user,
        } => {
            let (url, path) = place(&path, "/mkdir")?;
            let request = MakeDirectory {
                path,
                mode,
                user,
                parents,
            };
            client.post(&url, &request).await?;
        }
        Command::Rm { path, recursive } => {
            let (url, path) = place(&path, "")?;
            client.delete(&url, &RemoveFile { path, recursive }).await?;
        }
        Command::Mv { from, to, force } => {
            let (url, from) = place(&from, "/rename")?;
            let replace = force;
            client.post(&url, &RenameFile { from, to, replace }).await?;
        }
        Command::Pack { path, archive } => {
            let (url, path) = place(&path, "/archive")?;
            let request = ArchivePath { path, user: None };
            let pieces = client.bytes(&url, &request).await?;
            receive(pieces, &archive).await?;
        }
        Command::Unpack {
            archive,
            path,
            user,
        } => {
            let (url, path) = place(&path, "/archive")?;
            let body = open(&archive).await?;
            let request = ArchivePath { path, user };
            client.put_bytes(&url, &request, body).await?;
        }
        Command::Watch { path, recursive } => {
            let (url, path) = place(&path, "/watch")?;
            let changes = client.stream(&url, &WatchFiles { path, recursive }).await?;
            let mut changes = std::pin::pin!(changes);
            while let Some(change) = changes.next().await {
                let change: FileChange = change?;
                context.show(&change, |it| {
                    format!("{} {}", word(&it.kind), printable(&it.path))
                })?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn entries_table(entries: &[FileEntry]) -> String {
    let lines = entries.iter().map(|entry| {
        let target = entry.target.as_deref().map(printable);
        vec![
            word(&entry.kind),
            entry.mode.clone(),
            format!("{}:{}", entry.uid, entry.gid),
            bytes(entry.size_bytes),
            match target {
                Some(target) => format!("{} -> {target}", printable(&entry.name)),
                None => printable(&entry.name),
            },
        ]
    });
    table(&["KIND", "MODE", "OWNER", "SIZE", "NAME"], lines.collect())
}
