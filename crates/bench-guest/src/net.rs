//! The network to the measuring program: what a TCP connection takes and how fast it answers, and
//! ticks, whose gaps show when a guest did not run.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// What one write hands over.
const CHUNK: usize = 128 << 10;

/// Bytes a second of `mib` MiB, from the first byte until the other end has taken all and closed.
pub(crate) fn send(address: &str, mib: u64) -> io::Result<Vec<u64>> {
    let mut stream = TcpStream::connect(address)?;
    let chunk = vec![0x5A; CHUNK];
    let bytes = mib << 20;
    let start = Instant::now();
    for _ in 0..bytes / CHUNK as u64 {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    io::copy(&mut stream, &mut io::sink())?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(vec![(bytes as f64 / seconds) as u64])
}

/// Nanoseconds of each of `count` bytes that go there and come back.
pub(crate) fn ping(address: &str, count: u64) -> io::Result<Vec<u64>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

/// Sends a datagram with its number every so many microseconds. Ends only by a signal.
pub(crate) fn tick(address: &str, microseconds: u64) -> io::Result<Vec<u64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    for number in 0_u64.. {
        // One that is not taken is a gap, which is what is looked for.
        let _ = socket.send(&number.to_le_bytes());
        thread::sleep(Duration::from_micros(microseconds));
    }
    Ok(Vec::new())
}
