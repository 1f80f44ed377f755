//! The report that a VM's process sends to its launcher once: the VM runs, with the status of its
//! jail, or the reason why it does not.
//!
//! The report is JSON on the process's standard output, a pipe that ends with it.

use std::fs::File;
use std::io::{self, Read, Write};

use clone_api::jail::JailStatus;
use clone_api::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};

/// The largest report that is read.
const MAX_REPORT: u64 = 64 << 10;

/// The format of a report.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report<J, E> {
    Ready(J),
    Failed(E),
}

/// Reports that the VM runs in this jail, and closes the launcher's pipe.
pub fn ready(jail: &JailStatus) -> io::Result<()> {
    send(&Report::<_, &ApiError>::Ready(jail))
}

/// Reports why the VM does not run.
pub fn failed(error: &ApiError) -> io::Result<()> {
    send(&Report::<&JailStatus, _>::Failed(error))
}

fn send(report: &Report<&JailStatus, &ApiError>) -> io::Result<()> {
    let report = serde_json::to_vec(report)?;
    let mut pipe = io::stdout().lock();
    let sent = pipe.write_all(&report).and_then(|()| pipe.flush());
    // The launcher reads to the end of the pipe, so the pipe must be closed even if the write
    // failed.
    let null = detached()?;
    rustix::stdio::dup2_stdout(&null)?;
    sent
}

/// Opens the target of a VM process's standard streams: `/dev/null`, or, in a jail without it, a
/// pipe that nobody reads.
fn detached() -> io::Result<File> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.or_else(|_| {
        let (_, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok(File::from(write))
    })
}

/// Reads a report to the end of `pipe`: the status of the VM's jail if the VM runs. `None` if the
/// process ended without a report.
pub fn read(pipe: impl Read) -> io::Result<Option<Result<JailStatus, ApiError>>> {
    let mut text = Vec::new();
    pipe.take(MAX_REPORT).read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(None);
    }
    let report = serde_json::from_slice::<Report<_, _>>(&text).unwrap_or_else(|error| {
        Report::Failed(ApiError::new(
            ErrorCode::Internal,
            format!("the VM's process sent a report that cannot be read: {error}"),
        ))
    });
    Ok(Some(match report {
        Report::Ready(jail) => Ok(jail),
        Report::Failed(error) => Err(error),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_ready_or_the_error_and_silence_is_neither() {
        let (jail, error) = (
            JailStatus::default(),
            ApiError::new(ErrorCode::HostUnsupported, "no KVM").advise("get one"),
        );
        let text = |report: Report<&JailStatus, &ApiError>| serde_json::to_vec(&report).unwrap();
        let ready = text(Report::Ready(&jail));
        assert_eq!(read(&ready[..]).unwrap(), Some(Ok(jail.clone())));
        assert_eq!(read(&b""[..]).unwrap(), None);
        let failed = text(Report::Failed(&error));
        assert_eq!(read(&failed[..]).unwrap(), Some(Err(error.clone())));
        assert!(read(&b"{\"cut"[..]).unwrap().unwrap().is_err());
    }
}
