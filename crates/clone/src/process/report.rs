//! What a VM's process tells its launcher, once: that it runs, or why not.
//!
//! The report is JSON on the process's standard output, a pipe that ends with it: `null` where
//! the VM runs, else the error.

use std::fs::File;
use std::io::{self, Read, Write};

use clone_api::{ApiError, ErrorCode};

/// The largest report that is read.
const MAX_REPORT: u64 = 64 << 10;

/// Tells that the VM runs, and lets go of the launcher's pipe.
pub fn ready() -> io::Result<()> {
    send(b"null")
}

/// Tells why the VM does not run.
pub fn failed(error: &ApiError) -> io::Result<()> {
    send(&serde_json::to_vec(error)?)
}

fn send(report: &[u8]) -> io::Result<()> {
    let mut pipe = io::stdout().lock();
    let sent = pipe.write_all(report).and_then(|()| pipe.flush());
    // The launcher reads to the end of the pipe, so it must end here even when the write failed.
    let null = detached()?;
    rustix::stdio::dup2_stdout(&null)?;
    sent
}

/// Where the standard streams of a VM's process lead: `/dev/null`, or, in a jail without it, a
/// pipe that nobody reads.
fn detached() -> io::Result<File> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.or_else(|_| {
        let (_, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok(File::from(write))
    })
}

/// Reads a report to the end of `pipe`: `Ok(Ok(()))` where the VM runs. `None` where the process
/// ended without one.
pub fn read(pipe: impl Read) -> io::Result<Option<Result<(), ApiError>>> {
    let mut text = Vec::new();
    pipe.take(MAX_REPORT).read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(None);
    }
    let report = serde_json::from_slice::<Option<ApiError>>(&text).unwrap_or_else(|error| {
        Some(ApiError::new(
            ErrorCode::Internal,
            format!("the VM's process sent a report that cannot be read: {error}"),
        ))
    });
    Ok(Some(report.map_or(Ok(()), Err)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_ready_or_the_error_and_silence_is_neither() {
        assert_eq!(read(&b"null"[..]).unwrap(), Some(Ok(())));
        assert_eq!(read(&b""[..]).unwrap(), None);
        let error = ApiError::new(ErrorCode::HostUnsupported, "no KVM").advise("get one");
        let text = serde_json::to_vec(&error).unwrap();
        assert_eq!(read(&text[..]).unwrap(), Some(Err(error)));
        assert!(read(&b"{\"cut"[..]).unwrap().unwrap().is_err());
    }
}
