//! Both ends of many execs, in a process of their own: the clients, and the agents of guests that greet
//! and then say nothing. The measuring process has no files left for them, and its threads and memory
//! are the server's.
//!
//! The measuring process sends commands to this one as lines on its standard input, and reads a line
//! from its standard output when a command is complete.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use agent_proto::frame;
use agent_proto::messages::{FromAgent, Hello, from_agent};
use anyhow::{Context as _, Result};
use army_controller::testing::fleet_vm_id;
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;

/// How many execs are being started at a time.
const STARTING: u32 = 100;

/// The options of the process.
#[derive(Args, Debug, Clone)]
pub(crate) struct Options {
    /// The socket where agents are to be reached.
    #[arg(long)]
    socket: PathBuf,
    /// The address of the server, HOST:PORT.
    #[arg(long)]
    server: String,
    /// The key of the clients.
    #[arg(long)]
    key: String,
    /// The number of execs.
    #[arg(long)]
    execs: u32,
    /// The number of VMs that they are in.
    #[arg(long)]
    vms: u32,
}

/// The numbers of requests that agents have received, and of their connections that have ended.
#[derive(Default)]
struct Counts {
    received: watch::Sender<u32>,
    ended: watch::Sender<u32>,
}

async fn reaches(counts: &watch::Sender<u32>, count: u32) {
    // The sender is borrowed, so it lives.
    let _ = counts.subscribe().wait_for(|it| *it >= count).await;
}

/// Runs the process.
pub(crate) fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> Result<()> {
    let listener = UnixListener::bind(&options.socket)?;
    let counts = Arc::new(Counts::default());
    say("listening")?;
    for _ in 0..options.execs {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(agent(stream, Arc::clone(&counts)));
    }
    told("start").await?;
    let mut clients = Vec::new();
    for number in 0..options.execs {
        reaches(&counts.received, number.saturating_sub(STARTING)).await;
        clients.push(client(options, number).await?);
    }
    reaches(&counts.received, options.execs).await;
    say("open")?;
    told("end").await?;
    drop(clients);
    reaches(&counts.ended, options.execs).await;
    say("ended")
}

fn say(word: &str) -> Result<()> {
    println!("{word}");
    Ok(std::io::stdout().flush()?)
}

async fn told(word: &'static str) -> Result<()> {
    let told = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        anyhow::ensure!(line.trim() == word, "told {line:?} instead of {word}");
        Ok(())
    });
    told.await?
}

async fn agent(mut stream: UnixStream, counts: Arc<Counts>) -> Result<()> {
    let hello = from_agent::Kind::Hello(Hello::default());
    let mut greeting = Vec::new();
    frame::encode(&FromAgent { kind: Some(hello) }, &mut greeting)?;
    stream.write_all(&greeting).await?;
    let mut bytes = [0; 1024];
    let read = stream.read(&mut bytes).await?;
    anyhow::ensure!(read > 0, "a connection has ended without a request");
    counts.received.send_modify(|it| *it += 1);
    // A connection that was cut off ends with an error.
    while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    counts.ended.send_modify(|it| *it += 1);
    Ok(())
}

async fn client(options: &Options, number: u32) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(&options.server).await?;
    let body = r#"{"command":["sleep","3600"],"timeout_ms":3600000}"#;
    let vm = fleet_vm_id(number % options.vms + 1);
    let request = format!(
        "POST /v1/vms/{vm}/exec HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        options.server,
        options.key,
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    Ok(stream)
}

/// The process, as the measuring one has it.
pub(super) struct Peers {
    process: Child,
    words: ChildStdin,
    answers: std::io::BufReader<ChildStdout>,
}

impl Peers {
    /// Starts the process, which then waits for connections at the socket.
    pub(super) fn start(
        socket: &Path,
        server: &str,
        key: &str,
        execs: u32,
        vms: u32,
    ) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("exec-peers")
            .arg("--socket")
            .arg(socket)
            .args(["--server", server, "--key", key])
            .args(["--execs", &execs.to_string(), "--vms", &vms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start the peers")?;
        let words = process.stdin.take().context("the peers have no input")?;
        let answers = process.stdout.take().context("the peers have no output")?;
        let mut peers = Self {
            process,
            words,
            answers: std::io::BufReader::new(answers),
        };
        peers.answered("listening")?;
        Ok(peers)
    }

    /// Tells the process something, and waits until it is done.
    pub(super) fn tell(&mut self, word: &str, answer: &str) -> Result<()> {
        writeln!(self.words, "{word}")?;
        self.answered(answer)
    }

    fn answered(&mut self, answer: &str) -> Result<()> {
        use std::io::BufRead;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        anyhow::ensure!(
            line.trim() == answer,
            "the peers said {line:?} instead of {answer}"
        );
        Ok(())
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}
