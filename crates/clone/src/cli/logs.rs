//! `clone logs`: prints what the console showed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use agent_proto::text::printable;
use clone_api::{ApiError, ErrorCode};
use clone_host::runtime::RunningVm;
use clone_start::VmDir;
use clone_start::error::{Result, failed};
use rustix::event::{PollFd, PollFlags, poll};

use super::Context;

/// Print the output of a VM's serial console.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM.
    name: String,
    /// Follow new output until the VM ends.
    #[arg(long, short)]
    follow: bool,
    /// Print the log of the VM's own process instead of the console.
    #[arg(long, conflicts_with = "follow")]
    vmm: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let vm = context.runtime()?.find(&args.name)?;
    let printed = if args.vmm {
        let path = vm.dir.vmm_log();
        let text = std::fs::read(&path).map_err(failed("read", &path))?;
        print_lines(&String::from_utf8_lossy(&text))
    } else if vm.dir.config()?.console.log_limit.0 == 0 {
        return Err(ApiError::new(
            ErrorCode::Unavailable,
            format!("the VM `{}` keeps no log of its console", args.name),
        )
        .advise("start it with --console-log 1M, or look with `clone attach`"));
    } else if args.follow {
        follow(&vm)
    } else {
        print_log(&vm.dir)
    };
    match printed {
        Ok(()) => Ok(ExitCode::SUCCESS),
        // The reader has closed the output.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(error) => Err(failed("print the log in", vm.dir.path())(error)),
    }
}

fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Prints a log of a VM's process, which its guest may have taken over, so its text is made
/// printable.
fn print_lines(text: &str) -> io::Result<()> {
    let lines = text.lines().map(|line| printable(line) + "\n");
    print(lines.collect::<String>().as_bytes())
}

fn print_log(dir: &VmDir) -> io::Result<()> {
    for path in [dir.old_console_log(), dir.console_log()] {
        let file = File::open(path)?;
        let mut bytes = vec![0; 64 << 10];
        let mut at = 0;
        loop {
            let count = file.read_at(&mut bytes, at)?;
            if count == 0 {
                break;
            }
            print(&bytes[..count])?;
            at += count as u64;
        }
    }
    Ok(())
}

/// Follows the console socket, which begins with the latest output of the log.
fn follow(vm: &RunningVm) -> io::Result<()> {
    let mut stream = UnixStream::connect(vm.dir.console_socket())?;
    let mut buffer = [0; 4096];
    let stdout = io::stdout();
    loop {
        let mut fds = [
            PollFd::new(&stream, PollFlags::IN),
            // An empty event set only reports that the reader has closed the output.
            PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let reader_gone = fds[1].revents().contains(PollFlags::ERR);
        if reader_gone {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => print(&buffer[..count])?,
        }
    }
}
