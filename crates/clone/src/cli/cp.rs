//! `clone cp`: copies files into a guest and out of it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use agent_proto::client::{ByteLimit, Connection, Deadline};
use agent_proto::messages::Put;
use clone_api::{ApiError, ErrorCode};
use clone_cli::FileSink;
use clone_start::error::{Result, failed};
use indicatif::ProgressBar;
use serde::Serialize;

use super::agent::Wait;
use super::output::human_bytes;
use super::{Context, agent, progress};

/// The time limit for the start and the end of a copy; the transfer of its bytes extends it.
const LIMIT: Duration = Duration::from_secs(60);
/// The most that is copied to standard output.
const MAX_STREAM: ByteLimit = ByteLimit::new(1 << 40);

/// Copy a file into a guest, or out of it.
///
/// One side is NAME:PATH, an absolute path in the guest; the other is a path on this host, or `-`
/// for standard input or output. A file is written atomically, with its permissions; in a
/// directory, it keeps its name. Data can be copied into devices and pipes of this host; in a guest
/// they are refused. To copy whole directories: tar c DIR | clone exec -i NAME tar x -C PATH
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The source: PATH, NAME:PATH or -
    from: OsString,
    /// The destination: PATH, NAME:PATH or -
    to: OsString,
    /// The owner of the file in the guest: a name or number, optionally with :GROUP.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Guest { name: &'a str, path: &'a str },
    Here(&'a Path),
    Stream,
}

impl<'a> Side<'a> {
    fn parse(side: &'a OsStr) -> Self {
        if side == "-" {
            return Self::Stream;
        }
        // Names in a guest are UTF-8, as the agent's protocol requires; a file on this host may
        // have any name.
        match side.to_str().and_then(|text| text.split_once(':')) {
            // A path on this host may have a colon after its first slash: ./a:b
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                Self::Guest { name, path }
            }
            _ => Self::Here(Path::new(side)),
        }
    }
}

/// The output of `clone cp --json`.
#[derive(Serialize)]
struct Copied {
    bytes: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let bytes = match (Side::parse(&args.from), Side::parse(&args.to)) {
        (Side::Guest { .. }, Side::Guest { .. }) => {
            return Err(usage("both sides are in guests", "copy to here first"));
        }
        (from, Side::Guest { name, path }) => {
            let user = args.user.clone().unwrap_or_default();
            put(context, &from, (name, path), user, args.wait)?
        }
        (Side::Guest { name, path }, to) => get(context, (name, path), &to, args.wait)?,
        _ => {
            return Err(usage(
                "neither side is in a guest",
                "write one as NAME:PATH",
            ));
        }
    };
    context.output.print(&Copied { bytes }, |_| String::new());
    Ok(ExitCode::SUCCESS)
}

fn usage(message: &str, advice: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidConfig, message).advise(advice)
}

fn put(
    context: &Context,
    from: &Side<'_>,
    (name, path): (&str, &str),
    user: String,
    wait: Wait,
) -> Result<u64> {
    let (mut source, mode, size): (Box<dyn Read>, u32, Option<u64>) = match from {
        Side::Here(file) => {
            let opened = File::open(file).map_err(failed("open", file))?;
            let about = opened.metadata().map_err(failed("look at", file))?;
            if about.is_dir() {
                let message = format!("{} is a directory", file.display());
                return Err(usage(
                    &message,
                    "tar c DIR | clone exec -i NAME tar x -C PATH",
                ));
            }
            let mode = about.permissions().mode() & 0o7777;
            (Box::new(opened), mode, Some(about.len()))
        }
        _ => (Box::new(io::stdin().lock()), 0o644, None),
    };
    let own = match from {
        Side::Here(file) => file.file_name().unwrap_or_default(),
        _ => OsStr::new(""),
    };
    let path = match (path.ends_with('/'), own.to_str()) {
        // As in cp, a file that is copied into a directory keeps its name.
        (true, Some(own)) => format!("{path}{own}"),
        (true, None) => {
            let message = format!("{own:?} is not UTF-8, and names in a guest are text");
            return Err(usage(
                &message,
                "give the name that it is to have in the guest: NAME:PATH/NEW",
            ));
        }
        (false, _) => path.to_owned(),
    };
    let connection = connect(context, name, wait)?;
    let bar = progress::bytes(context, size);
    let mut source = Counted::new(&mut source, bar);
    let put = Put {
        path,
        mode,
        user,
        name: own.to_str().unwrap_or_default().to_owned(),
    };
    let sent = connection
        .put(put, &mut source)
        .map_err(agent::agent_error(name));
    source.finish(sent)
}

fn get(context: &Context, (name, path): (&str, &str), to: &Side<'_>, wait: Wait) -> Result<u64> {
    let connection = connect(context, name, wait)?;
    let bar = progress::bytes(context, None);
    let Side::Here(target) = to else {
        let mut stdout = io::stdout().lock();
        let mut sink = Counted::new(&mut stdout, bar);
        let got = connection.get(path, &mut sink, MAX_STREAM);
        let got = got.map_err(agent::agent_error(name));
        return sink.finish(got.map(drop));
    };
    let target = landing(path, target);
    let failed_to = |what| failed(what, &target);
    let mut sink = FileSink::open(&target).map_err(failed_to("write"))?;
    let room = room_for(sink.file()).map_err(failed_to("look at the file system of"))?;
    let mut counted = Counted::new(&mut sink, bar);
    let got = connection
        .get(path, &mut counted, room)
        .map_err(agent::agent_error(name));
    let mode = got.as_ref().map_or(0o600, |about| about.mode & 0o777);
    let bytes = counted.finish(got.map(drop))?;
    sink.keep(mode).map_err(failed_to("put in place"))?;
    Ok(bytes)
}

fn connect(context: &Context, name: &str, wait: Wait) -> Result<Connection> {
    let vm = context.runtime()?.find(name)?;
    let mut connection = agent::connect(&vm, wait)?;
    connection.set_deadline(Deadline::after(LIMIT));
    Ok(connection)
}

/// The most bytes that a guest may write into `file`, so that it cannot fill the file system. A
/// device or a pipe has no limit.
fn room_for(file: &File) -> io::Result<ByteLimit> {
    if !file.metadata()?.is_file() {
        return Ok(MAX_STREAM);
    }
    let about = rustix::fs::fstatvfs(file)?;
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    Ok(ByteLimit::new(free - free / 16))
}

/// The destination of a guest's file: under its own name if `target` is a directory, otherwise
/// `target` itself.
fn landing(path: &str, target: &Path) -> PathBuf {
    match Path::new(path).file_name() {
        Some(own) if target.is_dir() => target.join(own),
        _ => target.to_owned(),
    }
}

/// A stream that counts the bytes that pass through it.
struct Counted<'a, T> {
    stream: &'a mut T,
    bar: ProgressBar,
    bytes: u64,
}

impl<'a, T> Counted<'a, T> {
    fn new(stream: &'a mut T, bar: ProgressBar) -> Self {
        Self {
            stream,
            bar,
            bytes: 0,
        }
    }

    fn count(&mut self, bytes: usize) -> usize {
        self.bytes += bytes as u64;
        self.bar.inc(bytes as u64);
        bytes
    }

    fn finish(self, end: Result<()>) -> Result<u64> {
        self.bar.finish_and_clear();
        end?;
        tracing::debug!(size = human_bytes(self.bytes), "copied");
        Ok(self.bytes)
    }
}

impl<T: Read> Read for Counted<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        Ok(self.count(count))
    }
}

impl<T: Write> Write for Counted<'_, T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.stream.write(buffer)?;
        Ok(self.count(count))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_side_is_in_a_guest_when_it_begins_with_a_name() {
        let guest = |name, path| Side::Guest { name, path };
        let parse = |text: &'static str| Side::parse(OsStr::new(text));
        assert_eq!(parse("web:/etc/hosts"), guest("web", "/etc/hosts"));
        assert_eq!(parse("web:/a:b ,=\n"), guest("web", "/a:b ,=\n"));
        for here in ["a", "./a:b", "/a:b", ":x", "./-", "a b,c=d"] {
            assert_eq!(parse(here), Side::Here(Path::new(here)));
        }
        assert_eq!(parse("-"), Side::Stream);
        let bytes = OsStr::from_bytes(b"web:/n\xff");
        assert_eq!(Side::parse(bytes), Side::Here(Path::new(bytes)));
    }

    #[test]
    fn a_file_lands_in_a_directory_under_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(landing("/etc/hosts", dir.path()), dir.path().join("hosts"));
        let file = dir.path().join("x");
        assert_eq!(landing("/etc/hosts", &file), file);
    }
}
