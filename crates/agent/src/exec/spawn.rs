//! Starting a command's process: whom as, where, with which environment, pipes or a terminal.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use agent_proto::messages::{ErrorCode, Exec, TerminalSize};
use rustix::process::{Gid, Uid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::DEFAULT_PATH;
use crate::limits;
use crate::session::Refusal;
use crate::users::{self, User};

/// A process and our ends of its streams.
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
    set_environment(&mut command, request, &user)?;
    set_user(&mut command, &user);
    let directory = if request.directory.is_empty() {
        &user.home
    } else {
        &request.directory
    };
    let directory = if request.directory.is_empty() && !std::path::Path::new(directory).is_dir() {
        "/"
    } else {
        directory
    };
    command.current_dir(directory);
    let spawned = match request.terminal {
        Some(size) => with_terminal(&mut command, size),
        None => with_pipes(&mut command, request.input),
    };
    spawned.map_err(|error| explain(program, directory, &error))
}

/// `exec` fails with the same error for a program and for a folder that do not exist.
fn explain(program: &str, directory: &str, error: &io::Error) -> Refusal {
    if !std::path::Path::new(directory).is_dir() {
        let message = format!("cannot run {program} in {directory}: no such folder in the guest");
        return Refusal::new(ErrorCode::NotFound, message);
    }
    Refusal::io(format!("cannot run {program} in the guest"), error)
}

fn set_environment(command: &mut Command, request: &Exec, user: &User) -> Result<(), Refusal> {
    command.env_clear();
    command.env("PATH", DEFAULT_PATH).env("HOME", &user.home);
    command
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .env("SHELL", &user.shell);
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
    let groups: Vec<_> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (user.uid, Gid::from_raw(user.gid));
    let user_id = Uid::from_raw(uid);
    let switch = move || {
        rustix::process::setsid()?;
        limits::restore()?;
        // As an ordinary user (in tests) only oneself can be chosen, which needs no change.
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

fn with_pipes(command: &mut Command, wants_input: bool) -> io::Result<Spawned> {
    command.stdin(if wants_input {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let input = child
        .stdin
        .take()
        .map(|pipe| File::from(OwnedFd::from(pipe)));
    let stdout = child
        .stdout
        .take()
        .map(|pipe| File::from(OwnedFd::from(pipe)));
    let stderr = child
        .stderr
        .take()
        .map(|pipe| File::from(OwnedFd::from(pipe)));
    let outputs = stdout.into_iter().chain(stderr).collect();
    Ok(Spawned {
        child,
        input,
        outputs,
        terminal: None,
    })
}

fn with_terminal(command: &mut Command, size: TerminalSize) -> io::Result<Spawned> {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let path = ptsname(&main, Vec::new())?;
    let path = path.to_string_lossy().into_owned();
    // Not ours to be controlled by.
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
    // Ends of ours of the command's side would keep its terminal open after its end.
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
