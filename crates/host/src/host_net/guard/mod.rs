//! What a guest may send and receive, as programs that the kernel runs on the guest's own tap.
//!
//! The programs sit at the tap's traffic control hook (`tc`): the first place where a received
//! frame is judged, before the bridge, the packet filter and the host's stack, so that no frame
//! has a way around them. They are kept apart from the packet filter on purpose: `nft flush
//! ruleset`, which a restart of many firewalls does, leaves them in force.
//!
//! What is not listed here is dropped: this is a list of what may pass. The numbers are those of
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

/// The kernel's answer of a program that drops (`TC_ACT_SHOT`).
const SHOT: u32 = 2;

/// The mark of packets to guests that passed the packet filter's rules.
pub(super) const PASSED_MARK: u32 = 0xc10e_0001;

/// What a guest's interface is held to.
#[derive(Clone, Debug)]
pub(super) struct Guard<'a> {
    /// The guest's hardware address.
    pub(super) mac: MacAddr,
    /// The network that the interface is on.
    pub(super) place: Place<'a>,
    /// Whether the guest may reach others of which the same is true.
    pub(super) neighbours: bool,
    /// The destinations that the guest may send to.
    pub(super) egress: &'a Egress,
}

/// The network that a guest's interface is on.
#[derive(Clone, Debug)]
pub(super) enum Place<'a> {
    /// Behind the bridge of our own.
    Nat {
        /// The guest's address.
        address: Ipv4Addr,
        /// The network that it is in.
        range: Range,
    },
    /// On a bridge of the owner's.
    Bridge {
        /// The only addresses that the guest may use; any where there are none.
        addresses: &'a [IpAddr],
        /// Addresses of the host on this bridge and of its routers there, which no guest has.
        reserved: Vec<Ipv4Addr>,
        /// Other guests on this bridge that this one does not hear.
        strangers: Vec<MacAddr>,
    },
}

/// A program as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    /// The instructions.
    pub(super) bytes: Vec<u8>,
    /// How many they are.
    pub(super) count: usize,
}

impl From<Program> for Encoded {
    fn from(program: Program) -> Self {
        let (bytes, count) = program.encode();
        Self { bytes, count }
    }
}

impl Guard<'_> {
    /// Judges what the guest sends.
    pub(super) fn ingress(&self) -> Encoded {
        self.judge_sent().into()
    }

    /// Judges what the guest is to receive.
    pub(super) fn egress(&self) -> Encoded {
        self.judge_received().into()
    }

    /// Whether what is sent to a group reaches the guest.
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

    /// A guest without neighbours hears the host alone. One with neighbours hears no ARP about
    /// others, which is all that guests without neighbours send to more than the host.
    fn judge_received_behind_nat(&self, address: Ipv4Addr, range: &Range) -> Program {
        let target = Field::Word(38);
        let from_host = Program::require(mac_at(SOURCE, Range::mac_of(range.gateway())));
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

/// Drops what the host sends to guests without having passed a rule of the packet filter. While the
/// rules are missing nobody opens a connection to a guest, and no connection of a guest is answered.
pub(super) fn only_filtered() -> Encoded {
    let program = Program::of([
        Program::when(is(ETHER_TYPE, ARP), Program::accept()),
        Program::require(is(ETHER_TYPE, IPV4)),
        Program::require(is(Field::Mark, PASSED_MARK)),
        Program::accept(),
    ]);
    program.into()
}

/// Drops every frame. Unlike the other programs' answers, this one's is an action of the kernel's.
pub(super) fn drop_all() -> Encoded {
    Program::answer(SHOT).into()
}

fn broadcast() -> Condition {
    mac_at(DESTINATION, MacAddr([0xff; 6]))
}

/// Lets frames for single stations and for all of them pass, and of those for groups what `group`
/// lets pass. The addresses that bridges do not forward (01:80:C2:00:00:0X) are such groups.
fn stations(group: Program) -> Program {
    let is_group = is(Field::ByteBits(DESTINATION, 1), 1);
    Program::when(is_group, Program::unless(broadcast(), group))
}
