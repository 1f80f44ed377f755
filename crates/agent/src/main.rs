//! The guest agent: the guest's side of `clone exec`, `cp` and the rest.
//!
//! It listens on a vsock port and serves each connection on threads of its own: a guest has few at
//! a time, and while there is none the agent sleeps in one `accept` and wakes for nothing. As
//! process 1 of a minimal image it is also the init ([`init`]).
//!
//! A static build, which starts in any image:
//! `RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile agent -p clone-agent
//! --target x86_64-unknown-linux-gnu`. For that it looks users up itself ([`users`]): the C
//! library would want the guest's own at run time.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod boot_network;
mod connect;
mod conversation;
mod exec;
mod files;
mod furnish;
mod heap;
mod hosts;
mod identity;
mod image;
mod info;
mod init;
mod interfaces;
mod kernel_log;
mod limits;
mod listener;
mod machine_id;
mod power;
mod process;
mod replace;
mod report;
mod session;
mod shares;
mod ssh;
mod users;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::listener::Listener;
use crate::session::Agent;

/// The pause after a connection that could not be accepted; it still waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const USAGE: &str = "usage: clone-agent [--listen vsock:PORT | --listen unix:PATH]";

fn main() -> ExitCode {
    let mut listen = format!("vsock:{}", agent_proto::PORT);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--listen", Some(address)) => listen = address,
            _ if std::process::id() == 1 => break, // The kernel passes its unknown words on to init.
            _ => {
                say(USAGE);
                return ExitCode::from(2);
            }
        }
    }
    if std::process::id() == 1 {
        return init::main(|| serve(&listen));
    }
    serve(&listen)
}

/// Prints a line on the console, and ignores errors.
fn say(line: &str) {
    let _ = io::stderr().write_all(format!("clone-agent: {line}\n").as_bytes());
}

/// Serves until the process is killed. Returns only if it cannot listen.
fn serve(listen: &str) -> ExitCode {
    limits::raise();
    heap::share();
    let listener = match Listener::open(listen) {
        Ok(listener) => listener,
        Err(error) => {
            crate::say(&format!("cannot listen on {listen}: {error}"));
            return ExitCode::FAILURE;
        }
    };
    if listen.starts_with("vsock:") {
        boot_network::set_up();
        shares::mount_all();
        kernel_log::settle();
    }
    // This line on the console shows that the agent is ready.
    crate::say(&format!("ready on {listen}"));
    let agent = Arc::new(Agent::new());
    loop {
        match listener.accept() {
            Ok(stream) => session::start(&agent, stream),
            // The guest was restored elsewhere: its old connections are lost, and the listener
            // continues.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // Descriptors or memory are short for a while. Ending the agent would end all
                // commands.
                crate::say(&format!("cannot accept: {error}"));
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}
