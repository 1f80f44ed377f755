//! `army exec --input`: a command whose input and output are this process's, as bytes.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use army_api::client::{Client, ClientError, segment};
use army_api::streams::{STDERR, STDIN, STDOUT, StartStream, StreamEvent, StreamRequest};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use super::output::{code_of, note};
use super::{shell, socket};

/// Runs a command, and exits with its exit status.
pub(super) async fn run(client: &Client, vm: &str, start: StartStream) -> Result<ExitCode> {
    let path = format!("/v1/vms/{}/exec", segment(vm));
    let socket = socket::open(client, &path, &()).await?;
    let (mut sender, mut receiver) = socket.split();
    let text = serde_json::to_string(&StreamRequest::Start(start))?;
    sender.send(Message::Text(text.into())).await?;
    let mut typed = shell::typed();
    let mut more = true;
    let ended = loop {
        tokio::select! {
            message = receiver.next() => match message {
                Some(Ok(Message::Binary(bytes))) => print(&bytes)?,
                Some(Ok(Message::Text(text))) => match serde_json::from_str(&text)? {
                    StreamEvent::Ended(ended) => break ended,
                    StreamEvent::Failed { problem } => {
                        return Err(ClientError::Refused(problem).into());
                    }
                    StreamEvent::Lost { bytes, .. } => {
                        note(&format!("{bytes} bytes of output were lost"));
                    }
                    StreamEvent::Started { .. } => {}
                },
                Some(Ok(_)) => {}
                Some(Err(_)) | None => bail!("the connection was lost"),
            },
            bytes = typed.recv(), if more => {
                more = bytes.is_some();
                let message = match bytes {
                    Some(bytes) => Message::Binary([&[STDIN], &bytes[..]].concat().into()),
                    None => {
                        let text = serde_json::to_string(&StreamRequest::EndInput)?;
                        Message::Text(text.into())
                    }
                };
                sender.send(message).await?;
            }
        }
    };
    // A thread still waits for input, and would keep the process.
    let code = code_of(ended.exit_code, ended.signal, ended.timed_out);
    std::process::exit(code.into());
}

fn print(message: &[u8]) -> Result<()> {
    match message.split_first() {
        Some((&STDOUT, data)) => {
            let mut out = std::io::stdout();
            out.write_all(data)?;
            out.flush()?;
        }
        Some((&STDERR, data)) => std::io::stderr().write_all(data)?,
        _ => {}
    }
    Ok(())
}
