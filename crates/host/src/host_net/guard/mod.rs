//! The rules for the frames that a guest may send and receive, as programs that the kernel runs on
//! the guest's own tap.
//!
//! The programs are attached to the tap's traffic control hook (`tc`). A received frame passes this
//! hook first, before the bridge, the packet filter and the host's stack, so no frame can avoid
//! them. They are deliberately separate from the packet filter: `nft flush ruleset`, which a
//! restart of many firewalls does, leaves them in force.
//!
//! The rules list the frames that may pass; every other frame is dropped. The numbers are those of
//! RFC 826 (ARP), 791 (IPv4), 792 (ICMP), 2131 (DHCP), 8200 (IPv6), 4443 and 4861 (ICMPv6), 3376
//! (IGMP), 2710 and 3810 (MLD).

mod bpf;
mod ipv4;
mod ipv6;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr};

use clone_api::MacAddr;
use clone_api::config::Egress;

use super::range::Range;
use bpf::{Condition, Field, Program, is, mac_at};

/// Offsets of an Ethernet frame's fields, and their values.
const DESTINATION: u32 = 0;
const SOURCE: u32 = 6;
const ETHER_TYPE: Field = Field::Half(12);
const IPV4: u32 = 0x0800;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;

/// The traffic control action that drops a frame (`TC_ACT_SHOT`).
const SHOT: u32 = 2;

/// The mark of packets to guests that passed the packet filter's rules.
pub(super) const PASSED_MARK: u32 = 0xc10e_0001;

/// The rules for one guest's interface.
#[derive(Clone, Debug)]
pub(super) struct Guard<'a> {
    /// The guest's hardware address.
    pub(super) mac: MacAddr,
    /// The network that the interface is on.
    pub(super) place: Place<'a>,
    /// Whether the guest may reach other guests that have this set too.
    pub(super) neighbours: bool,
    /// The destinations that the guest may send to.
    pub(super) egress: &'a Egress,
}

/// The network that a guest's interface is on.
#[derive(Clone, Debug)]
pub(super) enum Place<'a> {
    /// Behind our own bridge.
    Nat {
        /// The guest's address.
        address: Ipv4Addr,
        /// The network of that address.
        range: Range,
    },
    /// On an owner's bridge.
    Bridge {
        /// The only addresses that the guest may use; any where there are none.
        addresses: &'a [IpAddr],
        /// Addresses of the host on this bridge and of its routers there, which no guest has.
        reserved: Vec<Ipv4Addr>,
        /// Other guests on this bridge from which this one receives nothing.
        strangers: Vec<MacAddr>,
    },
}

/// A program in the kernel's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    /// The instructions.
    pub(super) bytes: Vec<u8>,
    /// The number of instructions.
    pub(super) count: usize,
}

impl From<Program> for Encoded {
    fn from(program: Program) -> Self {
        let (bytes, count) = program.encode();
        Self { bytes, count }
    }
}

impl Guard<'_> {
    /// The program for frames that the guest sends.
    pub(super) fn ingress(&self) -> Encoded {
        self.judge_sent().into()
    }

    /// The program for frames that the guest receives.
    pub(super) fn egress(&self) -> Encoded {
        self.judge_received().into()
    }

    /// Whether multicast frames reach the guest.
    pub(super) fn hears_groups(&self) -> bool {
        self.neighbours || matches!(self.place, Place::Bridge { .. })
    }

    fn judge_sent(&self) -> Program {
        Program::of([
            Program::require(is(Field::VlanTagged, 0)),
            Program::require(mac_at(SOURCE, self.mac)),
            Program::when(is(ETHER_TYPE, ARP), self.arp()),
            Program::when(is(ETHER_TYPE, IPV4), self.ipv4()),
            self.ipv6(),
            Program::reject(),
        ])
    }

    fn judge_received(&self) -> Program {
        match &self.place {
            Place::Nat { address, range } => self.judge_received_behind_nat(*address, range),
            Place::Bridge { strangers, .. } => {
                let strangers = strangers
                    .iter()
                    .map(|&mac| Program::when(mac_at(SOURCE, mac), Program::reject()));
                Program::of(strangers.chain([Program::accept()]))
            }
        }
    }

    /// A guest without neighbours receives from the host only. One with neighbours receives no ARP
    /// about other guests; broadcast ARP is all that guests without neighbours can send beyond the
    /// host.
    fn judge_received_behind_nat(&self, address: Ipv4Addr, range: &Range) -> Program {
        let target = Field::Word(38);
        let from_host = Program::require(mac_at(SOURCE, range.gateway_mac()));
        Program::of([
            if self.neighbours {
                Program::default()
            } else {
                from_host
            },
            Program::when(
                is(ETHER_TYPE, ARP),
                Program::require(is(target, address.to_bits())),
            ),
            Program::require_value(ETHER_TYPE, &[ARP, IPV4]),
            Program::accept(),
        ])
    }
}

/// Drops packets from the host to guests that did not pass a rule of the packet filter. While the
/// rules are missing, no connection to a guest can be opened, and no connection of a guest is
/// answered.
pub(super) fn only_filtered() -> Encoded {
    let program = Program::of([
        Program::when(is(ETHER_TYPE, ARP), Program::accept()),
        Program::require(is(ETHER_TYPE, IPV4)),
        Program::require(is(Field::Mark, PASSED_MARK)),
        Program::accept(),
    ]);
    program.into()
}

/// Drops every frame. Unlike the results of the other programs, this one's result is a traffic
/// control action.
pub(super) fn drop_all() -> Encoded {
    Program::answer(SHOT).into()
}

fn broadcast() -> Condition {
    mac_at(DESTINATION, MacAddr([0xff; 6]))
}

/// Accepts unicast and broadcast frames, and those multicast frames that `group` accepts. The
/// addresses that bridges do not forward (01:80:C2:00:00:0X) are multicast too.
fn stations(group: Program) -> Program {
    let is_group = is(Field::ByteBits(DESTINATION, 1), 1);
    Program::when(is_group, Program::unless(broadcast(), group))
}
