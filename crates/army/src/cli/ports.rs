//! `army port-forward`: connects ports of this host with ports of a VM.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use army_api::Client;
use army_api::client::segment;
use army_api::exec::PortMessage;
use army_api::vms::Vm;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::context::Context;
use super::output::note;
use super::socket::{self, Socket};

/// The most bytes that are read at once.
const PIECE: usize = 64 << 10;

/// Forward ports of this host to ports of a VM, until interrupted.
///
/// Connections go through Army and the VM's agent: the VM needs no network, and its programs see a
/// client on their own loopback interface.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The VM: its id, its name, or TENANT/NAME for another tenant's.
    vm: String,
    /// The VM's port, preceded by the port of this host if that differs; 0 chooses a free one.
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    ports: Vec<Ports>,
    /// The address to listen on. Every client that reaches it can use the VM's port, without a key.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    listen: IpAddr,
}

/// A port of this host, and the port of the VM that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| format!("`{text}` is no port"))
        };
        let (local, remote) = match text.split_once(':') {
            Some((local, remote)) => (number(local)?, number(remote)?),
            None => (number(text)?, number(text)?),
        };
        match remote {
            0 => Err("port 0 of a VM is none".to_owned()),
            _ => Ok(Self { local, remote }),
        }
    }
}

/// The output for a port that is ready.
#[derive(Serialize)]
struct Forwarded<'a> {
    vm: &'a str,
    port: u16,
    local: SocketAddr,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let client = context.client()?;
    // A VM that does not exist is reported before anybody connects.
    let vm: Vm = client
        .get(&format!("/v1/vms/{}", segment(&args.vm)), &())
        .await?;
    let mut listeners = Vec::new();
    for ports in &args.ports {
        let address = SocketAddr::new(args.listen, ports.local);
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))?;
        listeners.push((listener, ports.remote));
    }
    for (listener, port) in listeners {
        let forwarded = Forwarded {
            vm: &vm.name,
            port,
            local: listener.local_addr()?,
        };
        context.show(&forwarded, |it| {
            format!("{} leads to port {} of {}", it.local, it.port, it.vm)
        })?;
        // The VM is named by its id, because another VM may get its name later.
        tokio::spawn(accept(listener, client.clone(), vm.id.clone(), port));
    }
    tokio::signal::ctrl_c().await?;
    Ok(ExitCode::SUCCESS)
}

async fn accept(listener: TcpListener, client: Client, vm: String, port: u16) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                note(&format!("cannot accept a connection: {error}"));
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (client, path) = (
            client.clone(),
            format!("/v1/vms/{}/ports/{}", segment(&vm), port),
        );
        tokio::spawn(async move {
            let carried = async {
                let socket = socket::open(&client, &path, &()).await?;
                carry(stream, socket).await
            };
            if let Err(error) = carried.await {
                note(&format!("a connection to port {port} ended: {error:#}"));
            }
        });
    }
}

/// Forwards in both directions independently, until both sides have ended or one is lost.
async fn carry(stream: TcpStream, socket: Socket) -> Result<()> {
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    let (sender, receiver) = socket.split();
    tokio::select! {
        lost = to_server(reader, sender) => lost,
        ended = to_local(receiver, writer) => ended,
    }
}

/// Returns only where something fails.
async fn to_server(
    mut reader: OwnedReadHalf,
    mut sender: SplitSink<Socket, Message>,
) -> Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let len = reader.read(&mut piece).await?;
        if len == 0 {
            break;
        }
        let bytes = piece[..len].to_vec();
        sender.send(Message::Binary(bytes.into())).await?;
    }
    let text = serde_json::to_string(&PortMessage::End)?;
    sender.send(Message::Text(text.into())).await?;
    std::future::pending().await
}

async fn to_local(mut receiver: SplitStream<Socket>, mut writer: OwnedWriteHalf) -> Result<()> {
    while let Some(message) = receiver.next().await {
        match message? {
            Message::Binary(bytes) => writer.write_all(&bytes).await?,
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(PortMessage::End) => writer.shutdown().await?,
                // A newer server may send other messages.
                Err(_) => {}
            },
            Message::Close(Some(frame)) if frame.code == CloseCode::Normal => return Ok(()),
            Message::Close(_) => break,
            _ => {}
        }
    }
    anyhow::bail!("the connection was lost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_port_stands_for_both() {
        let ports = |text: &str| text.parse::<Ports>();
        let pair = |local, remote| Ok(Ports { local, remote });
        assert_eq!(ports("80"), pair(80, 80));
        assert_eq!(ports("8080:80"), pair(8080, 80));
        assert_eq!(ports("0:80"), pair(0, 80));
        for wrong in ["", "x", "0", "80:0", "70000", "1:2:3"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
