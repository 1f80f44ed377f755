//! The control queue: how a driver picks its queue pairs and offloads and says that it has
//! announced itself.
//!
//! Source: VIRTIO 1.3, 5.1.6.5 (control virtqueue).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::budget::Budget;
use crate::virtio::{
    DescriptorChain, DeviceError, GuestRam, Interrupt, Reader, Served, ServedQueue, Turn,
};

/// Commands carried out by one call.
const BUDGET: Budget = Budget::new(16, u64::MAX);

/// What a driver may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// It has announced itself.
    AnnounceAck,
    /// It uses this many queue pairs from now on.
    SetQueuePairs(u16),
    /// It wants these offloads of those it negotiated (feature bits).
    SetGuestOffloads(u64),
}

/// Carries out the commands in the queue. `execute` returns whether the device does what is asked.
pub(super) fn serve(
    queue: &mut ServedQueue,
    ram: &GuestRam,
    interrupt: &dyn Interrupt,
    mut execute: impl FnMut(Command) -> Result<bool, DeviceError>,
) -> Result<(), DeviceError> {
    let mut handler = |queue: &mut ServedQueue, chain: &mut DescriptorChain<'_>| {
        let done = match parse(chain.reader()) {
            Some(command) => execute(command)?,
            None => false,
        };
        let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let answered = chain.writer().write_all(&[status as u8]);
        answered.map_err(|_| queue.driver_error("a control command has no room for its answer"))?;
        Ok(Served::Used {
            written: 1,
            bytes: 0,
        })
    };
    let mut budget = BUDGET;
    queue.serve(ram, interrupt, &mut Turn::new(&mut budget), &mut handler)?;
    Ok(())
}

/// Reads a command. Returns `None` where it is cut short or is not one that was offered.
fn parse(mut reader: Reader<'_, '_>) -> Option<Command> {
    let [class, command] = reader.read_array().ok()?;
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Command::AnnounceAck),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let pairs = reader.read_array().ok()?;
            Some(Command::SetQueuePairs(u16::from_le_bytes(pairs)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            let offloads = reader.read_array().ok()?;
            Some(Command::SetGuestOffloads(u64::from_le_bytes(offloads)))
        }
        _ => None,
    }
}
