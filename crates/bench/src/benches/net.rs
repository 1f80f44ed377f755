//! A network interface, seen from the guest.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::guests::{CloneVm, Guest, Machine, Qemu, exec, measure, put_program, wait_for_agent};
use crate::record::{Figure, Record};

pub(crate) const ABOUT: &str =
    "TCP throughput and round trips, guest to host over tap and vhost-net, beside QEMU's";

/// The VMMs with their interface, and its network's first three bytes.
const NETS: [(&str, &str, &str); 2] = [
    ("clone", "clonebench1", "10.217.1"),
    ("QEMU", "clonebench2", "10.217.2"),
];

pub(crate) fn run(context: &Context) -> Result<Record> {
    let mut record = Record::new(&[
        "A program in the guest sends over TCP to the measuring program on the host: throughput from the first byte until the host has taken all, and single bytes that come back, one after the other.",
        "Both VMMs have a tap of their own with vhost-net on both sides, one queue. The two guests run at the same time and are measured in turns.",
    ]);
    let taps: Vec<Tap> = NETS
        .iter()
        .map(|(_, tap, net)| Tap::new(tap, &format!("{net}.1/24")))
        .collect::<Result<_>>()?;
    let machine = |index: usize| Machine {
        tap: taps.get(index).map(|tap| tap.name.clone()),
        ..Machine::standard(context, "vmlinux")
    };
    let ours = CloneVm::start(context, "net", &machine(0))?;
    let qemu = Qemu::start(context, &machine(1))?;
    let guests: [&dyn Guest; 2] = [&ours, &qemu];
    let mut hosts = Vec::new();
    for ((name, _, net), guest) in NETS.iter().zip(guests) {
        wait_for_agent(guest).context(*name)?;
        put_program(guest, context).context(*name)?;
        let address = format!("{net}.2/24");
        exec(guest, &["ip", "addr", "add", &address, "dev", "eth0"]).context(*name)?;
        exec(guest, &["ip", "link", "set", "eth0", "up"]).context(*name)?;
        hosts.push((take(net)?, echo(net)?));
    }
    let (mib, count) = (
        context.samples(32, 128).to_string(),
        context.samples(200, 1000).to_string(),
    );
    let (mut speeds, mut pings) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..context.samples(3, 5) {
        for (index, (guest, (taker, echoer))) in guests.iter().zip(&hosts).enumerate() {
            let speed = measure(*guest, &["net-send", taker, &mib])?;
            speeds[index].extend(speed.iter().map(|bytes| bytes / f64::from(1 << 20)));
            let times = measure(*guest, &["net-ping", echoer, &count])?;
            pings[index].extend(times.iter().map(|ns| ns / 1e3));
        }
    }
    for ((name, ..), samples) in NETS.iter().zip(speeds) {
        record.add(Figure::new(
            &format!("{name} TCP to host"),
            "MiB/s",
            samples,
        ));
    }
    for ((name, ..), samples) in NETS.iter().zip(pings) {
        record.add(Figure::new(&format!("{name} round trip"), "us", samples));
    }
    record.ratio(
        "clone TCP to host",
        "QEMU TCP to host",
        Some("more is better"),
    )?;
    record.ratio("clone round trip", "QEMU round trip", None)?;
    Ok(record)
}

/// Listens on the host's address in `net`, with a thread that ends with the process for each
/// connection; returns where.
fn listen(net: &str, serve: fn(TcpStream) -> io::Result<()>) -> Result<String> {
    let listener = TcpListener::bind(format!("{net}.1:0")).context("cannot listen on the tap")?;
    let address = listener.local_addr()?.to_string();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // One that breaks is told by its other end, in the guest.
            thread::spawn(move || serve(stream));
        }
    });
    Ok(address)
}

fn take(net: &str) -> Result<String> {
    listen(net, |mut stream| {
        let mut chunk = vec![0; 256 << 10];
        while stream.read(&mut chunk)? > 0 {}
        Ok(())
    })
}

fn echo(net: &str) -> Result<String> {
    listen(net, |mut stream| {
        stream.set_nodelay(true)?;
        let mut byte = [0];
        while stream.read(&mut byte)? > 0 {
            stream.write_all(&byte)?;
        }
        Ok(())
    })
}

/// A tap with an address for the host; gone when dropped.
pub(super) struct Tap {
    pub(super) name: String,
}

impl Tap {
    pub(super) fn new(name: &str, address: &str) -> Result<Self> {
        // Of a run that was ended by force.
        let _ = ip(&["link", "delete", name]);
        let tap = Self {
            name: name.to_owned(),
        };
        ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"])?;
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", &self.name]);
    }
}

pub(super) fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output();
    let output = output.context("cannot start `ip`")?;
    anyhow::ensure!(
        output.status.success(),
        "`ip {}`: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
