//! Streams between a host and a stock Linux guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use crate::rig::{Host, with_guest};

#[test]
fn a_linux_guest_and_a_host_talk_over_vsock() {
    with_guest(|host| {
        refused_ports_close(host);
        bytes_survive_both_ways_at_once(host);
        half_closed_streams_deliver_and_answer(host);
        many_streams_at_once(host);
        streams_survive_a_pause(host);
        figures(host);
    });
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn refused_ports_close(host: &Host) {
    // The guest must be up, so that it is the one who refuses.
    assert_eq!(host.answer("read /proc/sys/kernel/ostype 5"), b"Linux");
    assert!(host.connect(4242).is_none());
}

fn bytes_survive_both_ways_at_once(host: &Host) {
    let mut stream = host.ask("echo");
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(&pattern(8 << 20)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert!(got == pattern(8 << 20), "{} bytes came back", got.len());
}

fn half_closed_streams_deliver_and_answer(host: &Host) {
    let mut stream = host.ask("digest");
    stream.write_all(&[0; 1000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    // sha256 of a thousand zero bytes.
    assert_eq!(
        answer,
        "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"
    );
}

fn many_streams_at_once(host: &Host) {
    let mut streams: Vec<_> = (0..200).map(|_| host.ask("echo")).collect();
    for (stream, at) in streams.iter_mut().zip(0_u32..) {
        stream.write_all(&at.to_le_bytes()).unwrap();
    }
    for (stream, at) in streams.iter_mut().zip(0_u32..) {
        let mut echo = [0; 4];
        stream.read_exact(&mut echo).unwrap();
        assert_eq!(echo, at.to_le_bytes());
    }
}

fn streams_survive_a_pause(host: &Host) {
    let mut stream = host.ask("echo");
    let mut echo = |word: &[u8; 4]| {
        stream.write_all(word).unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, word);
    };
    echo(b"one ");
    // A pause comes at any moment of an exchange, so there are some.
    for _ in 0..8 {
        host.pause_for(Duration::from_millis(200));
        for _ in 0..10 {
            echo(b"more");
        }
    }
}

/// Not a test: for people who read the output.
fn figures(host: &Host) {
    let mut stream = host.ask("echo");
    let mut times: Vec<_> = (0..200)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    let start = Instant::now();
    let bytes = host.answer("source 16777216").len();
    let rate = bytes as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("round trip p50 {:?}, p99 {:?}", times[100], times[198]);
    println!("guest to host {rate:.0} MB/s");
    let start = Instant::now();
    let mut sink = host.ask("digest");
    sink.write_all(&pattern(16 << 20)).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    sink.read_to_end(&mut Vec::new()).unwrap();
    let rate = f64::from(16 << 20) / start.elapsed().as_secs_f64() / 1e6;
    println!("host to guest {rate:.0} MB/s");
}
