//! A connection between two hosts that is lost at a chosen word.
#![allow(unreachable_pub)]

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use clone_migration::wire::{Record, Reply};

use crate::guest_bench::Bench;

/// The word that is lost, with everything after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    Ready,
    Go,
    Running,
}

/// A relay between the command that sends and the command that receives.
pub struct Relay;

impl Relay {
    /// Moves a VM, and loses a word on the way; returns what both commands said.
    pub fn run(from: &Bench, receiving: &str, name: &str, word: Lost) -> (Output, Output) {
        let pipes = ["to", "back"].map(|it| from.path(&format!("pipe-{it}")));
        for pipe in &pipes {
            let _ = std::fs::remove_file(pipe);
            let made = Command::new("mkfifo").arg(pipe).status().unwrap();
            assert!(made.success());
        }
        let [to, back] = &pipes;
        // A shell gives what it starts in the background another standard input.
        let via = format!("exec 3<&0; cat <&3 > {to} & exec cat {back}");
        let sending = from
            .command(&["migrate", name, "--via", &via])
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut receiving: Child = Command::new("sh")
            .args(["-c", receiving])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lost = Arc::new(AtomicBool::new(false));
        let forth = relay(
            File::open(to).unwrap(),
            receiving.stdin.take().unwrap(),
            (word == Lost::Go).then(|| Record::Go.encode().to_vec()),
            Arc::clone(&lost),
        );
        let reply = match word {
            Lost::Ready => Some(Reply::Ready.encode()),
            Lost::Running => Some(Reply::Running.encode()),
            Lost::Go => None,
        };
        let back = relay(
            receiving.stdout.take().unwrap(),
            File::options().write(true).open(back).unwrap(),
            reply,
            Arc::clone(&lost),
        );
        let told = sending.wait_with_output().unwrap();
        let other = receiving.wait_with_output().unwrap();
        forth.join().unwrap();
        back.join().unwrap();
        assert!(lost.load(Ordering::Relaxed), "{told:?}, {other:?}");
        (told, other)
    }
}

/// Passes on what comes until it ends with `word`, which is lost. Then both directions end.
fn relay(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    word: Option<Vec<u8>>,
    lost: Arc<AtomicBool>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            if lost.load(Ordering::Relaxed) {
                return;
            }
            // The word comes alone, since the other side waits for it.
            if word.as_deref() == Some(&chunk[..count]) {
                lost.store(true, Ordering::Relaxed);
                return;
            }
            if to.write_all(&chunk[..count]).is_err() {
                return;
            }
        }
    })
}
