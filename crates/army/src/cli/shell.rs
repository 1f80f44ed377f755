//! `army shell`: a terminal in a VM, shown on this terminal.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Result;
use army_api::client::segment;
use army_api::exec::{Terminal, TerminalMessage};
use futures_util::{SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use super::context::Context;
use super::socket;

/// The character of Ctrl-D, which ends the input of a terminal.
const END_OF_INPUT: u8 = 4;

/// Open a shell in a VM.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The VM: its id, its name, or TENANT/NAME for another tenant's.
    vm: String,
    /// A command to run instead of the user's shell.
    #[arg(trailing_var_arg = true)]
    command: Vec<String>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let client = context.client()?;
    let (rows, columns) = size();
    let request = Terminal {
        rows,
        columns,
        command: (!args.command.is_empty()).then(|| args.command.join(" ")),
    };
    let path = format!("/v1/vms/{}/terminal", segment(&args.vm));
    let socket = socket::open(&client, &path, &request).await?;
    let (mut sender, mut receiver) = socket.split();
    let raw = Raw::enter()?;
    let mut resized = signal(SignalKind::window_change())?;
    let mut typed = typed();
    let mut more = true;
    let code = loop {
        tokio::select! {
            message = receiver.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    let mut out = std::io::stdout();
                    out.write_all(&bytes)?;
                    out.flush()?;
                }
                Some(Ok(Message::Text(text))) => {
                    if let Ok(TerminalMessage::Exited { exit_code }) = serde_json::from_str(&text) {
                        break exit_code;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => anyhow::bail!("the connection was lost"),
            },
            bytes = typed.recv(), if more => {
                more = bytes.is_some();
                // The end of the input is sent as the key that means it to a terminal.
                let bytes = bytes.unwrap_or_else(|| vec![END_OF_INPUT]);
                sender.send(Message::Binary(bytes.into())).await?;
            }
            _ = resized.recv() => {
                let (rows, columns) = size();
                let text = serde_json::to_string(&TerminalMessage::Resize { rows, columns })?;
                sender.send(Message::Text(text.into())).await?;
            }
        }
    };
    drop(raw);
    // The last output is printed before the process exits.
    std::io::stdout().flush()?;
    // A thread still waits for keys, and would keep the process.
    std::process::exit(code.unwrap_or(1));
}

/// The keys, or other input, read by a thread, because reading a terminal blocks.
pub(super) fn typed() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count) = std::io::stdin().read(&mut buffer) {
            if count == 0 || sender.blocking_send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdout().as_fd()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Sets the terminal to pass every key on, until this is dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        // The standard input is not a terminal, and nothing has to be changed.
        let Ok(before) = tcgetattr(stdin.as_fd()) else {
            return Ok(Self(None));
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, before);
        }
    }
}
