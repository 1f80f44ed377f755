//! Starts a command's process: its user, directory, environment, and pipes or terminal.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use agent_proto::messages::{ErrorCode, Exec, TerminalSize};
use rustix::fs::fchown;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::DEFAULT_PATH;
use crate::conversation::Refusal;
use crate::limits;
use crate::users::{self, User};

/// A process, and the agent's ends of its streams.
pub(super) struct Spawned {
    pub(super) child: Child,
    pub(super) input: Option<File>,
    /// Standard output (or the terminal), then standard error.
    pub(super) outputs: Vec<File>,
    pub(super) terminal: Option<OwnedFd>,
}

pub(super) fn spawn(request: &Exec) -> Result<Spawned, Refusal> {
    let Some((program, arguments)) = request.command.split_first() else {
        return Err(Refusal::new(
            ErrorCode::Invalid,
            "no command was given, and the image names none",
        ));
    };
    let words = request.command.iter().chain(&request.environment);
    if words.clone().any(|word| word.contains('\0')) {
        return Err(Refusal::new(ErrorCode::Invalid, "a word holds a zero byte"));
    }
    let user = users::find(&request.user)?;
    let mut command = Command::new(program);
    command.args(arguments);
    if request.login_shell {
        // A leading `-` in its name makes a shell a login shell.
        let name = Path::new(program).file_name().unwrap_or_default();
        command.arg0(format!("-{}", name.to_string_lossy()));
    }
    set_environment(&mut command, request, &user)?;
    set_user(&mut command, &user);
    let directory = if request.directory.is_empty() {
        &user.home
    } else {
        &request.directory
    };
    let directory = if request.directory.is_empty() && !Path::new(directory).is_dir() {
        "/"
    } else {
        directory
    };
    command.current_dir(directory);
    let spawned = match request.terminal {
        Some(size) => with_terminal(&mut command, size, &user),
        None => with_pipes(&mut command, request.input, &user),
    };
    spawned.map_err(|error| explain(program, directory, &error))
}

/// `exec` fails with the same error for a program and for a folder that do not exist.
fn explain(program: &str, directory: &str, error: &io::Error) -> Refusal {
    if !Path::new(directory).is_dir() {
        let message = format!("cannot run {program} in {directory}: no such folder in the guest");
        return Refusal::new(ErrorCode::NotFound, message);
    }
    if error.kind() == io::ErrorKind::ArgumentListTooLong {
        let message = format!(
            "cannot run {program}: its arguments and environment are too long for the guest's kernel"
        );
        return Refusal::new(ErrorCode::Invalid, message);
    }
    Refusal::io(format!("cannot run {program} in the guest"), error)
}

fn set_environment(command: &mut Command, request: &Exec, user: &User) -> Result<(), Refusal> {
    command.env_clear();
    command.env("PATH", DEFAULT_PATH).env("HOME", &user.home);
    command
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .envs(user.shell().map(|shell| ("SHELL", shell)));
    if request.terminal.is_some() {
        command.env("TERM", "xterm-256color");
    }
    for pair in &request.environment {
        let Some((name, value)) = pair.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            let message = format!("{pair:?} is not NAME=value");
            return Err(Refusal::new(ErrorCode::Invalid, message));
        };
        command.env(name, value);
    }
    Ok(())
}

fn set_user(command: &mut Command, user: &User) {
    let groups: Vec<_> = user
        .groups
        .iter()
        .map(|id| Gid::from_raw(id.get()))
        .collect();
    let (uid, gid) = (user.uid.get(), Gid::from_raw(user.gid.get()));
    let user_id = Uid::from_raw(uid);
    let switch = move || {
        rustix::process::setsid()?;
        limits::restore()?;
        // An ordinary user (in tests) can choose only itself, which needs no change.
        if rustix::process::geteuid().as_raw() == uid && uid != 0 {
            return Ok(());
        }
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(user_id, user_id, user_id)?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: these are system
    // calls on values made before the fork; nothing is allocated. The child has one thread, so what
    // is set for the thread is set for the process.
    unsafe { command.pre_exec(switch) };
}

fn with_pipes(command: &mut Command, wants_input: bool, user: &User) -> io::Result<Spawned> {
    let (stdout, out_end) = pipe_of(user)?;
    let (stderr, error_end) = pipe_of(user)?;
    let input = match wants_input {
        false => {
            command.stdin(Stdio::null());
            None
        }
        true => {
            let (in_end, input) = pipe_of(user)?;
            command.stdin(in_end);
            Some(input)
        }
    };
    let child = command.stdout(out_end).stderr(error_end).spawn()?;
    Ok(Spawned {
        child,
        input: input.map(File::from),
        outputs: vec![stdout.into(), stderr.into()],
        terminal: None,
    })
}

/// Makes a pipe that belongs to the user, since opening `/dev/stderr` and the like checks
/// permissions again.
fn pipe_of(user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    give(&into, user, Some(Gid::from_raw(user.gid.get())))?;
    Ok((out, into))
}

/// Gives a stream to the user. Without root's rights, the user is the agent's own.
fn give(stream: impl AsFd, user: &User, group: Option<Gid>) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        fchown(stream, Some(Uid::from_raw(user.uid.get())), group)?;
    }
    Ok(())
}

fn with_terminal(command: &mut Command, size: TerminalSize, user: &User) -> io::Result<Spawned> {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let path = ptsname(&main, Vec::new())?;
    let path = path.to_string_lossy().into_owned();
    // The terminal must not become the agent's controlling terminal.
    let flags = rustix::fs::OFlags::NOCTTY.bits() as i32;
    let terminal = {
        use std::os::unix::fs::OpenOptionsExt;
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?
    };
    tcsetwinsize(&terminal, winsize(size))?;
    // The group is the one that owns all terminals.
    give(&terminal, user, None)?;
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    // SAFETY: as in `set_user`; runs after it, so the session is new and has no terminal yet.
    unsafe {
        command.pre_exec(|| {
            rustix::process::ioctl_tiocsctty(io::stdin().as_fd())?;
            Ok(())
        });
    }
    let child = command.spawn()?;
    // The agent's copies of the command's side would keep the terminal open after the command's
    // end.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let input = File::from(main.try_clone()?);
    let output = File::from(main.try_clone()?);
    Ok(Spawned {
        child,
        input: Some(input),
        outputs: vec![output],
        terminal: Some(main),
    })
}

pub(super) fn winsize(size: TerminalSize) -> Winsize {
    let limit = |value: u32| value.min(u32::from(u16::MAX)) as u16;
    Winsize {
        ws_row: limit(size.rows),
        ws_col: limit(size.columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
