//! Connections from the host to programs in the guest.
//!
//! Each direction has a thread, so that one which is not read blocks only itself. A direction ends
//! independently, as in TCP; the connection ends when the host disconnects.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use agent_proto::messages::{Connect, Empty, ErrorCode, from_agent, from_host};

use crate::conversation::{End, Inbox, Outbox, Refusal, STACK_BYTES};

/// The addresses at which the guest's programs listen. A server on `localhost` may use either.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];
/// The time limit for connecting on the loopback; a server with a full queue may exceed it.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes that are taken at once.
const PIECE: usize = 16 << 10;

/// Connects the host with a port of the guest, until the host disconnects.
pub(crate) fn serve(request: &Connect, mut inbox: Inbox, outbox: &Outbox) -> Result<(), End> {
    let mut server = open(request.port)?;
    let failed = |error: &io::Error| Refusal::io("cannot serve the connection", error);
    let out = server.try_clone().map_err(|error| failed(&error))?;
    let answers = outbox.clone();
    outbox.send(from_agent::Kind::Connected(Empty {}))?;
    let sender = thread::Builder::new()
        .name("connect".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || send_out(out, &answers))
        .map_err(|error| failed(&error))?;
    let ended = take_in(&mut server, &mut inbox);
    // The server sees its client go, and the other thread the end of the server's stream.
    let _ = server.shutdown(Shutdown::Both);
    let _ = sender.join();
    ended
}

fn open(port: u32) -> Result<TcpStream, Refusal> {
    let number = u16::try_from(port).ok().filter(|port| *port > 0);
    let number =
        number.ok_or_else(|| Refusal::new(ErrorCode::Invalid, format!("{port} is no TCP port")))?;
    let mut last = None;
    for address in LOOPBACK {
        match TcpStream::connect_timeout(&SocketAddr::new(address, number), LIMIT) {
            Ok(stream) => {
                // Interactive input must not be delayed to be sent with more.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            // The error of the first address is the one to report.
            Err(error) => last = last.or(Some(error)),
        }
    }
    let error = last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
    let message = format!("cannot connect to port {number} in the guest: {error}");
    let code = match error.kind() {
        io::ErrorKind::ConnectionRefused => ErrorCode::NotFound,
        _ => ErrorCode::Other,
    };
    Err(Refusal::new(code, message))
}

/// Passes the host's data to the server. After the end of the data, the connection's end means that
/// the host has disconnected.
fn take_in(server: &mut TcpStream, inbox: &mut Inbox) -> Result<(), End> {
    loop {
        match inbox.receive()? {
            Some(from_host::Kind::Data(data)) => {
                server.write_all(&data).map_err(|_| End::Lost)?;
            }
            Some(from_host::Kind::DataEnd(_)) => {
                // A server that has already disconnected ignores this.
                let _ = server.shutdown(Shutdown::Write);
            }
            _ => {}
        }
    }
}

/// Passes the server's data to the host, until its end.
fn send_out(mut server: TcpStream, outbox: &Outbox) {
    let mut piece = vec![0; PIECE];
    loop {
        match server.read(&mut piece) {
            Ok(0) => break,
            Ok(len) => {
                let data = from_agent::Kind::Data(piece[..len].to_vec());
                if outbox.send(data).is_err() {
                    // Shutting down ends a server that only writes as well.
                    let _ = server.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The stream was reset: no more data follows, and the protocol cannot tell the host how
            // it ended.
            Err(_) => break,
        }
    }
    let _ = outbox.done();
}
