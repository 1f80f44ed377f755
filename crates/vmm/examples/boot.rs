//! The smallest use of the crate: boots a kernel with its console on standard output.
//!
//! `boot KERNEL [INITRD [CMDLINE…]]`, with 256 MiB of RAM and two CPUs.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use clone_memory::{GuestMemory, RamLayout};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::{Kernel, Machine, Parts};
use kvm_ioctls::Kvm;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let image = File::open(
        words
            .next()
            .ok_or("usage: boot KERNEL [INITRD [CMDLINE…]]")?,
    )?;
    let initrd = words.next().map(File::open).transpose()?;
    let more: Vec<String> = words.collect();
    let cmdline = format!("console=ttyS0 panic=-1 {}", more.join(" "));
    let layout = RamLayout::new(256 << 20).ok_or("odd RAM size")?;
    let start = Instant::now();
    let mut events = EventLoop::new()?;
    let parts = Parts {
        kvm: Kvm::new()?,
        memory: GuestMemory::anonymous(&layout)?,
        vcpus: 2,
        console: Box::new(std::io::stdout()),
        devices: Vec::new(),
        confine_vcpu: Arc::new(|| Ok(())),
    };
    let mut machine = Machine::new(parts, &mut events)?;
    machine.boot(&mut Kernel {
        image,
        initrd,
        cmdline,
    })?;
    println!("assembled in {:?}", start.elapsed());
    machine.resume()?;
    let exit = loop {
        if let Some(exit) = machine.exit() {
            break exit;
        }
        events.run_once(100)?;
    };
    println!("ended after {:?}: {exit:?}", start.elapsed());
    Ok(())
}
