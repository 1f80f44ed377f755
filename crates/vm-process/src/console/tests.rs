use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use clone_vmm::event_loop::EventLoop;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

/// A port that takes four bytes at a time and remembers them.
#[derive(Clone, Default)]
struct Port {
    seen: Arc<Mutex<Vec<u8>>>,
    room: Arc<Mutex<usize>>,
}

impl ConsoleInput for Port {
    fn input(&self, bytes: &[u8]) -> usize {
        let mut room = self.room.lock().unwrap();
        let count = bytes.len().min(*room);
        *room -= count;
        self.seen.lock().unwrap().extend_from_slice(&bytes[..count]);
        count
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    events: EventLoop,
    hub: Arc<Mutex<ConsoleHub>>,
    output: ConsoleOutput,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut events = EventLoop::new().unwrap();
        let registrar = events.reserve();
        let file = || tempfile::tempfile().unwrap();
        let log = ConsoleLog::new(file(), file(), 8192);
        let (hub, output) = ConsoleHub::new(registrar.clone(), listener, Some(log)).unwrap();
        let hub = Arc::new(Mutex::new(hub));
        events.attach(&registrar, hub.clone());
        Self {
            _dir: dir,
            path,
            events,
            hub,
            output,
        }
    }

    /// Runs the loop until nothing is left to do.
    fn settle(&mut self) {
        while self.events.run_once(50).unwrap() > 0 {}
    }

    fn attach(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        self.settle();
        stream
    }

    fn attached(&self) -> u32 {
        self.hub.lock().unwrap().attached().load(Ordering::Relaxed)
    }
}

/// All that can be read now.
fn drain(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    // Ends with the time limit; what came before it is in `all`.
    let _ = stream.read_to_end(&mut all);
    all
}

#[test]
fn output_reaches_everyone_attached_and_those_who_come_later() {
    let mut bench = Bench::new();
    let mut first = bench.attach();
    let mut second = bench.attach();
    for byte in b"login: " {
        bench.output.write_all(&[*byte]).unwrap();
    }
    bench.settle();
    let mut third = bench.attach();
    for stream in [&mut first, &mut second, &mut third] {
        assert_eq!(drain(stream), b"login: ");
    }
    assert_eq!(bench.attached(), 3);
}

#[test]
fn a_line_wakes_the_event_loop_once() {
    let mut bench = Bench::new();
    for byte in b"a line that is printed byte by byte\r\n" {
        bench.output.write_all(&[*byte]).unwrap();
    }
    assert_eq!(bench.events.run_once(1000).unwrap(), 1);
    assert_eq!(bench.events.run_once(20).unwrap(), 0);
    bench.output.write_all(b"x").unwrap();
    assert_eq!(bench.events.run_once(1000).unwrap(), 1);
}

#[test]
fn a_client_that_leaves_is_forgotten_and_the_rest_goes_on() {
    let mut bench = Bench::new();
    let first = bench.attach();
    let mut second = bench.attach();
    drop(first);
    bench.settle();
    assert_eq!(bench.attached(), 1);
    bench.output.write_all(b"x").unwrap();
    bench.settle();
    assert_eq!(drain(&mut second), b"x");
    bench.attach();
    bench.settle();
    assert_eq!(bench.attached(), 1);
}

#[test]
fn input_waits_until_the_guest_takes_it_and_none_is_lost() {
    let mut bench = Bench::new();
    let port = Port::default();
    let drained = EventFd::new(EFD_NONBLOCK).unwrap();
    let connected = bench
        .hub
        .lock()
        .unwrap()
        .connect(Box::new(port.clone()), drained.try_clone().unwrap());
    connected.unwrap();
    let mut client = bench.attach();
    let typed: Vec<u8> = (0..20_000_u32).map(|n| n as u8).collect();
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    for _ in 0..1000 {
        if sent < typed.len()
            && let Ok(count) = client.write(&typed[sent..])
        {
            sent += count;
        }
        bench.settle();
        assert!(bench.hub.lock().unwrap().typed.len() <= MAX_PENDING_INPUT);
        *port.room.lock().unwrap() = 64;
        drained.write(1).unwrap();
        bench.settle();
        if port.seen.lock().unwrap().len() == typed.len() {
            break;
        }
    }
    assert!(*port.seen.lock().unwrap() == typed);
}

#[test]
fn a_client_that_does_not_read_stops_nobody_and_is_told_what_it_missed() {
    let mut bench = Bench::new();
    let mut slow = bench.attach();
    for _ in 0..1000 {
        bench.output.write_all(&[b'x'; 1024]).unwrap();
        bench.settle();
    }
    let mut seen = Vec::new();
    for _ in 0..100 {
        seen.extend(drain(&mut slow));
        bench.settle();
    }
    let text = String::from_utf8(seen).unwrap();
    let got = text.matches('x').count();
    let missed: usize = text
        .split("[clone: ")
        .skip(1)
        .map(|rest| rest.split(' ').next().unwrap().parse::<usize>().unwrap())
        .sum();
    assert!(missed > 0);
    assert_eq!(got + missed, 1000 * 1024);
    bench.output.write_all(b"again").unwrap();
    bench.settle();
    assert_eq!(drain(&mut slow), b"again");
}

#[test]
fn more_clients_than_there_is_room_for_are_turned_away() {
    let mut bench = Bench::new();
    let clients: Vec<_> = (0..MAX_CLIENTS + 3).map(|_| bench.attach()).collect();
    assert_eq!(bench.attached(), MAX_CLIENTS as u32);
    drop(clients);
    bench.settle();
    assert_eq!(bench.attached(), 0);
}

#[test]
fn output_that_the_loop_does_not_fetch_is_bounded_and_counted() {
    let mut bench = Bench::new();
    for _ in 0..(MAX_PENDING_OUTPUT / 1024 + 2) {
        bench.output.write_all(&[b'x'; 1024]).unwrap();
    }
    assert_eq!(
        bench.output.pending.lock().unwrap().bytes.len(),
        MAX_PENDING_OUTPUT
    );
    bench.settle();
    let mut client = bench.attach();
    assert!(drain(&mut client).ends_with(b"[clone: 2048 bytes of output lost]\r\n"));
}
