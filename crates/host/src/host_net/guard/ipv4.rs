//! The ARP and IPv4 that a guest may send.

use std::net::{IpAddr, Ipv4Addr};

use clone_api::Ipv4Network;
use clone_api::config::Egress;

use super::bpf::{Condition, Field, Program, is, mac_at};
use super::{DESTINATION, Guard, Place, Range, broadcast, stations};

/// Fields of ARP.
const OPERATION: Field = Field::Half(20);
const SENDER_MAC: u32 = 22;
const SENDER: Field = Field::Word(28);
const TARGET: Field = Field::Word(38);
const QUESTION: u32 = 1;
const ANSWER: u32 = 2;

/// Fields of IPv4.
const VERSION_AND_LENGTH: Field = Field::Byte(14);
const PROTOCOL: Field = Field::Byte(23);
const FROM: Field = Field::Word(26);
const TO: u32 = 30;
/// The offset of a fragment, ignoring the bit that says that more fragments follow.
const FRAGMENT_OFFSET: Field = Field::HalfBits(20, 0x1fff);
const FRAGMENT: Field = Field::HalfBits(20, 0x3fff);

const ICMP: u32 = 1;
const IGMP: u32 = 2;
const UDP: u32 = 17;
/// ICMP, TCP, UDP, DCCP, GRE, ESP, SCTP and UDP-Lite. IGMP has a rule of its own.
const TRANSPORTS: [u32; 8] = [ICMP, 6, UDP, 33, 47, 50, 132, 136];
/// ICMP without redirects (5) and router discovery (9, 10): a guest is no router.
const ICMP_TYPES: [u32; 7] = [0, 3, 8, 11, 12, 13, 14];
/// IGMP's reports and leaves; only routers send queries.
const IGMP_TYPES: [u32; 4] = [0x12, 0x16, 0x17, 0x22];
/// The network 169.254.0.0/16.
const LINK_LOCAL: u32 = 0xa9fe_0000;
const DHCP_SERVER: u32 = 67;
const DHCP_CLIENT_TO_SERVER: u32 = 68 << 16 | DHCP_SERVER;

impl Guard<'_> {
    pub(super) fn arp(&self) -> Program {
        let place = match &self.place {
            Place::Nat { address, range } => self.arp_behind_nat(address.to_bits(), range),
            Place::Bridge {
                addresses,
                reserved,
                ..
            } => arp_on_bridge(addresses, reserved),
        };
        Program::of([
            // Ethernet, IPv4 and the sizes of their addresses.
            Program::require(is(Field::Word(14), 0x0001_0800)),
            Program::require(is(Field::Half(18), 0x0604)),
            Program::require_value(OPERATION, &[QUESTION, ANSWER]),
            Program::require(mac_at(SENDER_MAC, self.mac)),
            place,
            Program::accept(),
        ])
    }

    /// A guest may send ARP requests and replies only with its own addresses. A guest without
    /// neighbours may send them to the host only.
    fn arp_behind_nat(&self, own: u32, range: &Range) -> Program {
        let question = Program::of([
            Program::require(is(OPERATION, QUESTION)),
            Program::require_value(TARGET, &[own, range.gateway().to_bits()]),
        ]);
        let to_host = Program::require(mac_at(DESTINATION, range.gateway_mac()));
        let destination = if self.neighbours {
            stations(Program::reject())
        } else {
            Program::of([
                Program::when(broadcast(), question),
                Program::unless(broadcast(), to_host),
            ])
        };
        // A station that probes for its address (RFC 5227) has none yet, and requests the address
        // itself.
        let probe = vec![(OPERATION, QUESTION), (SENDER, 0), (TARGET, own)];
        Program::of([destination, Program::require_one([is(SENDER, own), probe])])
    }

    pub(super) fn ipv4(&self) -> Program {
        let place = match &self.place {
            Place::Nat { address, range } => Program::of([
                self.ipv4_destination(range),
                Program::require(is(FROM, address.to_bits())),
            ]),
            Place::Bridge {
                addresses,
                reserved,
                ..
            } => self.ipv4_on_bridge(addresses, reserved),
        };
        Program::of([
            place,
            Program::require(without_options()),
            Program::require_value(PROTOCOL, &TRANSPORTS),
            payload(),
            self.allowed(),
            Program::accept(),
        ])
    }

    /// A guest without neighbours sends to the host only, and the host does not forward to other
    /// guests.
    fn ipv4_destination(&self, range: &Range) -> Program {
        let host = || mac_at(DESTINATION, range.gateway_mac());
        let mask = range.netmask().to_bits();
        let gateway = range.gateway().to_bits();
        let in_range = is(Field::WordBits(TO, mask), gateway & mask);
        let no_detour = Program::when(in_range, Program::require(is(Field::Word(TO), gateway)));
        let destination = if self.neighbours {
            stations(multicast())
        } else {
            Program::require(host())
        };
        Program::of([destination, Program::when(host(), no_detour)])
    }

    fn ipv4_on_bridge(&self, addresses: &[IpAddr], reserved: &[Ipv4Addr]) -> Program {
        Program::of([
            stations(multicast()),
            Program::when(is(FROM, 0), self.dhcp_client()),
            source(FROM, addresses, reserved),
            // Multicast addresses and those above them are never valid sources.
            Program::when(is(Field::ByteBits(26, 0xe0), 0xe0), Program::reject()),
            Program::when(is(PROTOCOL, IGMP), self.igmp()),
        ])
    }

    /// A guest that has no address yet may request one by DHCP, and may send nothing else.
    fn dhcp_client(&self) -> Program {
        Program::of([
            Program::require(without_options()),
            Program::require(vec![
                (PROTOCOL, UDP),
                (FRAGMENT, 0),
                (Field::Word(34), DHCP_CLIENT_TO_SERVER),
            ]),
            self.allowed(),
            Program::accept(),
        ])
    }

    /// Membership of groups, with or without the option that comes with it (router alert).
    fn igmp(&self) -> Program {
        const ROUTER_ALERT: u32 = 0x9404_0000;
        let with_option = Program::of([
            Program::require(is(Field::Word(34), ROUTER_ALERT)),
            Program::require_value(Field::Byte(38), &IGMP_TYPES),
        ]);
        let plain = Program::of([
            Program::require(without_options()),
            Program::require_value(Field::Byte(34), &IGMP_TYPES),
        ]);
        Program::of([
            Program::require(is(FRAGMENT, 0)),
            Program::when(is(VERSION_AND_LENGTH, 0x46), with_option),
            Program::unless(is(VERSION_AND_LENGTH, 0x46), plain),
            self.allowed(),
            Program::accept(),
        ])
    }

    /// Drops packets to destinations that are not allowed.
    fn allowed(&self) -> Program {
        match self.egress {
            Egress::Full => self.no_link_local(&[]),
            Egress::None => Program::reject(),
            Egress::Allow(networks) => Program::of([
                self.no_link_local(networks),
                Program::require_one(networks.iter().map(within)),
            ]),
        }
    }

    /// Behind NAT, link-local addresses (RFC 3927) are those of the host's own networks: the metadata
    /// service of a cloud is at 169.254.169.254, and gives the host's credentials to whomever asks.
    /// Only what a policy names itself is open, and a larger network does not name it.
    fn no_link_local(&self, networks: &[Ipv4Network]) -> Program {
        if matches!(self.place, Place::Bridge { .. }) {
            return Program::default();
        }
        let is_link_local = is(Field::WordBits(TO, 0xffff_0000), LINK_LOCAL);
        let named = networks.iter().filter(|network| {
            network.prefix() >= 16 && network.address().to_bits() & 0xffff_0000 == LINK_LOCAL
        });
        let mut named = named.map(within).peekable();
        let others = match named.peek() {
            Some(_) => Program::require_one(named),
            None => Program::reject(),
        };
        Program::when(is_link_local, others)
    }
}

fn within(network: &Ipv4Network) -> Condition {
    let mask = u32::MAX
        .checked_shl(32 - u32::from(network.prefix()))
        .unwrap_or(0);
    is(
        Field::WordBits(TO, mask),
        network.address().to_bits() & mask,
    )
}

fn arp_on_bridge(addresses: &[IpAddr], reserved: &[Ipv4Addr]) -> Program {
    // A station that probes for its address (RFC 5227) has none yet.
    let probe = Program::of([Program::require(is(OPERATION, QUESTION)), Program::accept()]);
    Program::of([
        stations(Program::reject()),
        Program::when(is(SENDER, 0), probe),
        source(SENDER, addresses, reserved),
    ])
}

/// Accepts an address only if it is in `addresses` or, if that is empty, not in `reserved`.
fn source(field: Field, addresses: &[IpAddr], reserved: &[Ipv4Addr]) -> Program {
    if addresses.is_empty() {
        let reserved = reserved.iter().map(|address| address.to_bits());
        return Program::of(reserved.map(|it| Program::when(is(field, it), Program::reject())));
    }
    let own = addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(is(field, address.to_bits())),
        IpAddr::V6(_) => None,
    });
    Program::require_one(own)
}

/// The groups of IPv4: hardware addresses from 01:00:5E:00:00:00 on.
fn multicast() -> Program {
    Program::require(is(Field::WordBits(DESTINATION, 0xffff_ff00), 0x0100_5e00))
}

/// Version 4 and a header of five words, which has no options. An option may name a route, which
/// could lead around the destination limits.
fn without_options() -> Condition {
    is(VERSION_AND_LENGTH, 0x45)
}

/// Drops packets that only routers and servers send. Fragments after the first have neither types
/// nor ports, and cannot change those of the first.
fn payload() -> Program {
    let icmp = Program::require_value(Field::Byte(34), &ICMP_TYPES);
    let dhcp_server = vec![(PROTOCOL, UDP), (Field::Half(34), DHCP_SERVER)];
    let first = Program::of([
        Program::when(is(PROTOCOL, ICMP), icmp),
        Program::when(dhcp_server, Program::reject()),
    ]);
    Program::when(is(FRAGMENT_OFFSET, 0), first)
}
