//! Whether this machine's KVM runs stock guests, found out by running one.
//!
//! Some machines have a `/dev/kvm` that only interprets an ordinary guest's instructions: a
//! hand-made guest of a few instructions runs, a kernel never finishes booting. So a tiny guest
//! counts down, and its speed tells.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// Iterations of two instructions each. Hardware needs a few milliseconds, an interpreter seconds.
const ITERATIONS: u32 = 2_000_000;
/// An interpreter reaches some 2 million instructions a second, hardware more than 1,000 million,
/// hardware emulated by QEMU some 600 million.
const STOCK_INSTRUCTIONS_PER_S: f64 = 30e6;
const GUEST_BYTES: usize = 4096;

/// What the probe found.
pub(crate) enum Verdict {
    /// Stock guests run.
    Stock { instructions_per_s: f64 },
    /// Guests are interpreted.
    Interpreted { instructions_per_s: f64 },
    /// There is no usable KVM.
    None { reason: String },
}

impl Verdict {
    pub(crate) fn runs_stock_guests(&self) -> bool {
        matches!(self, Self::Stock { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = |per_s: &f64| per_s / 1e6;
        match self {
            Self::Stock { instructions_per_s } => {
                write!(
                    f,
                    "KVM runs stock guests ({:.0} million instructions/s)",
                    millions(instructions_per_s)
                )
            }
            Self::Interpreted { instructions_per_s } => write!(
                f,
                "KVM only interprets guests ({:.1} million instructions/s): the testbed is used",
                millions(instructions_per_s)
            ),
            Self::None { reason } => write!(f, "no usable KVM ({reason}): the testbed is used"),
        }
    }
}

/// Tries it.
pub(crate) fn probe() -> Verdict {
    match count_down() {
        Ok(took) => {
            let instructions_per_s = f64::from(ITERATIONS) * 2.0 / took.as_secs_f64();
            if instructions_per_s >= STOCK_INSTRUCTIONS_PER_S {
                Verdict::Stock { instructions_per_s }
            } else {
                Verdict::Interpreted { instructions_per_s }
            }
        }
        Err(error) => Verdict::None {
            reason: format!("{error:#}"),
        },
    }
}

/// Runs `mov ecx, N; 1: dec ecx; jnz 1b; hlt` in real mode and times it.
fn count_down() -> Result<Duration> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    let mut code = vec![0x66, 0xB9];
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xFC, 0xF4]);
    // A whole page of its own: a memory slot starts at a page and has whole pages.
    let layout = std::alloc::Layout::from_size_align(GUEST_BYTES, GUEST_BYTES)?;
    // SAFETY: the layout is not of size 0.
    let page = unsafe { std::alloc::alloc_zeroed(layout) };
    anyhow::ensure!(!page.is_null(), "no memory");
    // SAFETY: the page is ours, and longer than the code.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), page, code.len()) };
    let region = kvm_userspace_memory_region {
        guest_phys_addr: 0x1000,
        memory_size: GUEST_BYTES as u64,
        userspace_addr: page as u64,
        ..Default::default()
    };
    // SAFETY: the page is never freed (it is one, and the process is short), so it outlives the VM.
    unsafe { vm.set_user_memory_region(region) }.context("cannot give the guest memory")?;
    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs)?;
    let start = Instant::now();
    loop {
        match vcpu.run().context("cannot run a guest")? {
            VcpuExit::Hlt => return Ok(start.elapsed()),
            VcpuExit::Intr => {}
            other => anyhow::bail!("a guest of four instructions ended with {other:?}"),
        }
    }
}
