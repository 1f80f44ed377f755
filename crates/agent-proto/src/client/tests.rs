//! Agents that keep to the protocol, and some that do not.

use std::os::unix::net::UnixListener;
use std::thread;

use super::*;
use crate::frame::Framed;
use crate::messages::{CommandInfo, Commands, Error, Exited, FromHost, Output, Stream};
use crate::text::MAX_TEXT;

/// How long a test's exchange may take; agents here hold on for much longer.
const SHORT: Duration = Duration::from_millis(200);
/// What no exchange of [`SHORT`] may take, on a machine under load.
const LONG: Duration = Duration::from_secs(5);

fn encoded(kind: from_agent::Kind) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
    bytes
}

fn hello() -> Vec<u8> {
    encoded(from_agent::Kind::Hello(Hello {
        agent_version: "7".to_owned(),
        ..Hello::default()
    }))
}

fn started() -> Vec<u8> {
    encoded(from_agent::Kind::Started(Started {
        id: 1,
        pid: 2,
        ..Started::default()
    }))
}

fn output(len: usize) -> Vec<u8> {
    encoded(from_agent::Kind::Output(Output {
        data: vec![b'x'; len],
        ..Output::default()
    }))
}

/// An agent that says `first`, and then `act` with its stream until the host hangs up.
fn agent(
    first: &[Vec<u8>],
    mut act: impl FnMut(&mut UnixStream) -> io::Result<()> + Send + 'static,
) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&first.concat()).unwrap();
    thread::spawn(move || while act(&mut theirs).is_ok() {});
    ours
}

/// The beginning of a message that is half a mebibyte long.
fn long_message() -> Vec<u8> {
    vec![0, 0, 8, 0]
}

/// Sends one byte of a long message, now and then.
fn drip(stream: &mut UnixStream) -> io::Result<()> {
    thread::sleep(Duration::from_millis(20));
    stream.write_all(&[0])
}

/// Sends nothing, and hears nothing.
fn sulk(_: &mut UnixStream) -> io::Result<()> {
    thread::sleep(LONG);
    Err(io::ErrorKind::TimedOut.into())
}

fn greeted(first: &[Vec<u8>], act: fn(&mut UnixStream) -> io::Result<()>) -> Connection {
    let stream = agent(&[&[hello()], first].concat(), act);
    Connection::greet(stream, Deadline::after(SHORT)).unwrap()
}

fn assert_late<T>(what: &str, result: Result<T>, begun: Instant) {
    let error = result.err().unwrap_or_else(|| panic!("{what} ended well"));
    assert!(matches!(error, ClientError::Late), "{what}: {error}");
    assert!(begun.elapsed() < LONG, "{what}: {:?}", begun.elapsed());
}

/// What a VM answers to a host that connects, piece by piece.
fn opened(name: &str, pieces: Vec<Vec<u8>>) -> Result<Connection> {
    let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let vm = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = [0; 13];
        stream.read_exact(&mut asked).unwrap();
        for piece in pieces {
            // The host may have hung up before the last one.
            let _ = stream.write_all(&piece);
            thread::sleep(Duration::from_millis(20));
        }
    });
    let opened = Connection::open(&path, Deadline::after(Duration::from_secs(10)));
    vm.join().unwrap();
    std::fs::remove_file(&path).unwrap();
    opened
}

#[test]
fn a_greeting_is_read_whole_however_it_comes() {
    let together = [b"OK 7\n".to_vec(), hello()].concat();
    let apart = together.iter().map(|&byte| vec![byte]).collect();
    let cut = together.split_at(9);
    for (number, pieces) in [apart, vec![cut.0.to_vec(), cut.1.to_vec()], vec![together]]
        .into_iter()
        .enumerate()
    {
        let connection = opened(&format!("greeting-{number}"), pieces).unwrap();
        assert_eq!(connection.hello().agent_version, "7");
    }
    let endless = vec![vec![b'O'; 2 * CONNECT_ANSWER_MAX]];
    for (number, pieces) in [endless, vec![b"NO\n".to_vec()], Vec::new()]
        .into_iter()
        .enumerate()
    {
        let refused = opened(&format!("no-greeting-{number}"), pieces);
        assert!(matches!(refused, Err(ClientError::NoAgent)));
    }
}

#[test]
fn a_greeting_that_drips_is_no_greeting() {
    let path = std::env::temp_dir().join(format!("drip-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    for answer in [Vec::new(), [b"OK 7\n".to_vec(), long_message()].concat()] {
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&answer).unwrap();
            while drip(&mut stream).is_ok() {}
        });
        let begun = Instant::now();
        let opened = Connection::open(&path, Deadline::after(SHORT));
        assert!(matches!(opened, Err(ClientError::NoAgent)));
        assert!(begun.elapsed() < LONG);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_vm_that_accepts_nobody_is_given_up() {
    let path = std::env::temp_dir().join(format!("full-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    // Everybody here waits in the backlog, until that is full.
    rustix::net::listen(&listener, 0).unwrap();
    let begun = Instant::now();
    let waiting: Vec<_> = (0..3)
        .map(|_| connect_by(&path, Deadline::after(SHORT)))
        .collect();
    assert!(matches!(waiting.last(), Some(Err(ClientError::Late))));
    assert!(begun.elapsed() < LONG);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn no_exchange_with_an_agent_that_drips_outlives_its_deadline() {
    type Door = fn(Connection) -> Result<()>;
    let doors: [(&str, Door); 11] = [
        ("info", |it| it.info().map(drop)),
        ("sync", |it| it.sync()),
        ("set_identity", |it| {
            it.set_identity(Identity::default()).map(drop)
        }),
        ("signal_command", |it| it.signal_command(1, 15)),
        ("shutdown", |it| it.shutdown(false)),
        ("commands", |it| it.commands().map(drop)),
        ("put", |it| it.put(Put::default(), &mut &b"content"[..])),
        ("get", |it| {
            let limit = ByteLimit::new(1 << 20);
            it.get("/f", &mut Vec::new(), limit).map(drop)
        }),
        ("connect", |it| it.connect(80).map(drop)),
        ("exec", |it| it.exec(Exec::default()).map(drop)),
        ("attach", |it| {
            it.attach(1, Acknowledge::default()).map(drop)
        }),
    ];
    for (what, door) in doors {
        let begun = Instant::now();
        assert_late(what, door(greeted(&[long_message()], drip)), begun);
    }
}

#[test]
fn a_command_whose_output_drips_is_collected_until_the_deadline() {
    /// Whole messages, each a moment after the other.
    fn whole(stream: &mut UnixStream) -> io::Result<()> {
        thread::sleep(Duration::from_millis(20));
        stream.write_all(&output(1))
    }
    let cases = [
        (long_message(), drip as fn(&mut _) -> _),
        (Vec::new(), whole),
    ];
    for (begun, act) in cases {
        let connection = greeted(&[started(), begun], act);
        let running = connection.exec(Exec::default()).unwrap();
        let begun = Instant::now();
        assert_late("collect", running.collect(ByteLimit::new(1 << 20)), begun);
    }
}

#[test]
fn an_agent_that_takes_nothing_is_given_up() {
    let begun = Instant::now();
    let endless = &mut io::repeat(0);
    let put = greeted(&[], sulk).put(Put::default(), endless);
    assert_late("put", put, begun);
}

#[test]
fn a_guest_that_falls_silent_is_given_up() {
    let begun = Instant::now();
    assert_late("info", greeted(&[], sulk).info(), begun);
    assert!(begun.elapsed() >= SHORT / 2);
}

#[test]
fn a_flood_of_output_ends_at_the_limit() {
    fn flood(stream: &mut UnixStream) -> io::Result<()> {
        stream.write_all(&output(CHUNK))
    }
    let mut connection = greeted(&[started()], flood);
    connection.set_deadline(Deadline::after(Duration::from_secs(60)));
    let running = connection.exec(Exec::default()).unwrap();
    let flooded = running.collect(ByteLimit::new(1 << 20));
    let error = flooded.unwrap_err();
    assert!(matches!(error, ClientError::TooMuch(_)), "{error}");
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
}

#[test]
fn a_flood_ends_at_the_limit_where_the_agent_reads_no_acknowledgements() {
    let mut cursor = 0;
    let stream = agent(&[hello(), started()], move |stream| {
        let output = Output {
            cursor,
            data: vec![b'x'; CHUNK],
            ..Output::default()
        };
        cursor += CHUNK as u64;
        stream.write_all(&encoded(from_agent::Kind::Output(output)))
    });
    let connection = Connection::greet(stream, Deadline::after(Duration::from_secs(60))).unwrap();
    let running = connection.exec(Exec::default()).unwrap();
    let begun = Instant::now();
    // More than the acknowledgements of which have room on their way.
    let flooded = running.collect(ByteLimit::new(64 << 20));
    assert!(matches!(flooded, Err(ClientError::TooMuch(_))));
    assert!(begun.elapsed() < Duration::from_secs(50));
}

#[test]
fn a_flood_of_messages_that_mean_nothing_ends_at_the_deadline() {
    fn flood(stream: &mut UnixStream) -> io::Result<()> {
        // Messages without a kind, and input taken.
        let taken = encoded(from_agent::Kind::InputTaken(u64::MAX));
        stream.write_all(&[vec![0; 4 * 100], taken].concat())
    }
    let begun = Instant::now();
    assert_late("info", greeted(&[], flood).info(), begun);
}

#[test]
fn a_file_that_is_longer_than_its_limit_is_cut_off() {
    fn flood(stream: &mut UnixStream) -> io::Result<()> {
        stream.write_all(&encoded(from_agent::Kind::Data(vec![0; CHUNK])))
    }
    let file = encoded(from_agent::Kind::File(FileInfo::default()));
    let mut content = Vec::new();
    let limit = ByteLimit::new(10 * CHUNK as u64);
    let got = greeted(&[file], flood).get("/f", &mut content, limit);
    assert!(matches!(got, Err(ClientError::TooMuch(_))));
    assert_eq!(content.len(), 10 * CHUNK);
}

#[test]
fn a_file_that_comes_fast_enough_may_take_longer_than_the_deadline() {
    fn steady(stream: &mut UnixStream) -> io::Result<()> {
        thread::sleep(SHORT / 4);
        stream.write_all(&encoded(from_agent::Kind::Data(vec![0; CHUNK])))
    }
    let file = encoded(from_agent::Kind::File(FileInfo::default()));
    let limit = ByteLimit::new(20 * CHUNK as u64);
    let got = greeted(&[file], steady).get("/f", &mut io::sink(), limit);
    // It came to its limit, and not to its deadline.
    assert!(matches!(got, Err(ClientError::TooMuch(_))));
}

#[test]
fn a_stream_may_be_silent_for_longer_than_its_handshake() {
    let mut running = greeted(&[started()], |stream| {
        thread::sleep(2 * SHORT);
        stream.write_all(&output(3))
    })
    .exec(Exec::default())
    .unwrap()
    .streaming();
    assert!(matches!(running.next_event(), Ok(Event::Output(..))));
}

#[test]
fn output_that_fits_is_collected_whole() {
    let exited = Exited {
        code: Some(3),
        ..Exited::default()
    };
    let end = encoded(from_agent::Kind::Exited(exited));
    let stderr = encoded(from_agent::Kind::Output(Output {
        stream: Stream::Stderr.into(),
        cursor: 0,
        data: b"ee".to_vec(),
    }));
    let connection = greeted(&[started(), output(2), stderr, end], sulk);
    let collected = connection.exec(Exec::default()).unwrap();
    let collected = collected.collect(ByteLimit::new(4)).unwrap();
    assert_eq!(collected.exited, exited);
    assert_eq!(
        (&*collected.stdout, &*collected.stderr),
        (&b"xx"[..], &b"ee"[..])
    );
}

#[test]
fn what_an_agent_says_comes_in_printable() {
    let evil = "\u{1b}[2J".repeat(MAX_TEXT);
    let error = encoded(from_agent::Kind::Error(Error {
        message: evil.clone(),
        ..Error::default()
    }));
    let refused = greeted(&[error], sulk).sync().unwrap_err().to_string();
    assert!(refused.starts_with(r"\u{1b}[2J"), "{refused}");
    assert_eq!(refused.chars().count(), MAX_TEXT);
    let commands = encoded(from_agent::Kind::Commands(Commands {
        commands: vec![CommandInfo {
            command: vec![evil],
            ..CommandInfo::default()
        }],
    }));
    let listed = greeted(&[commands], sulk).commands().unwrap();
    assert!(!listed[0].command[0].contains('\u{1b}'));
}

/// A connection to an agent that greets with `hello`, and the agent's end.
fn greeted_with(hello: Hello) -> (Connection, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(&encoded(from_agent::Kind::Hello(hello)))
        .unwrap();
    let connection = Connection::greet(ours, Deadline::after(LONG)).unwrap();
    (connection, theirs)
}

#[test]
fn a_request_is_as_long_as_the_agent_takes_and_longer_ones_are_not_sent() {
    let exec = |len| Exec {
        command: vec!["x".repeat(len)],
        ..Exec::default()
    };
    let newer = Hello {
        max_message: Some(FromHost::MAX as u32),
        ..Hello::default()
    };
    for (hello, len) in [(Hello::default(), 1 << 20), (newer, 8 << 20)] {
        let (connection, mut agent) = greeted_with(hello);
        let Err(ClientError::TooLong { max, .. }) = connection.exec(exec(len)) else {
            panic!("a request of {len} bytes was sent");
        };
        assert_eq!(max, len);
        // The connection ended without a word.
        let mut sent = Vec::new();
        agent.read_to_end(&mut sent).unwrap();
        assert_eq!(sent, b"");
    }
}

#[test]
fn notices_of_a_guest_are_bounded_and_harmless_to_a_terminal() {
    let (connection, mut agent) = greeted_with(Hello::default());
    let notice = format!("\x1b]0;owned\x07{}", "x".repeat(5000));
    let mut bytes = encoded(from_agent::Kind::Notice(notice)).repeat(1000);
    bytes.extend(encoded(from_agent::Kind::Done(Empty {})));
    let guest = thread::spawn(move || agent.write_all(&bytes).map(|()| agent));
    let notices = connection.set_identity(Identity::default()).unwrap();
    assert_eq!(notices.len(), MAX_NOTICES);
    assert!(notices.iter().all(|it| it.chars().count() <= MAX_TEXT));
    assert!(!notices.concat().contains(char::is_control));
    guest.join().unwrap().unwrap();
}

#[test]
fn an_acknowledgement_that_had_to_wait_is_sent_although_nothing_more_arrives() {
    let first = [
        hello(),
        started(),
        output(crate::OUTPUT_WINDOW / 4),
        encoded(from_agent::Kind::InputTaken(1)),
    ];
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&first.concat()).unwrap();
    let agent = thread::spawn(move || {
        // Meanwhile the host's input fills the socket, and its acknowledgement has to wait.
        thread::sleep(SHORT);
        theirs.set_read_timeout(Some(LONG)).unwrap();
        let mut decoder = frame::Decoder::default();
        let mut chunk = vec![0; 64 << 10];
        loop {
            while let Some(message) = decoder.next::<FromHost>().unwrap() {
                if let Some(from_host::Kind::Acknowledge(_)) = message.kind {
                    let exited = encoded(from_agent::Kind::Exited(Exited::default()));
                    return theirs.write_all(&exited).unwrap();
                }
            }
            let len = theirs.read(&mut chunk).unwrap();
            decoder.push(&chunk[..len]);
        }
    });
    let connection = Connection::greet(ours, Deadline::after(LONG)).unwrap();
    let mut running = connection
        .exec(Exec {
            input: true,
            ..Exec::default()
        })
        .unwrap();
    let input = running.input();
    let writer = thread::spawn(move || input.write(&vec![0; 4 << 20]));
    // By then the writer is blocked in sending.
    thread::sleep(SHORT / 2);
    assert!(matches!(running.next_event().unwrap(), Event::Output(..)));
    assert!(matches!(running.next_event().unwrap(), Event::Exited(_)));
    agent.join().unwrap();
    drop(running);
    let _ = writer.join().unwrap();
}
