//! The IPv6 packets that a guest on an owner's bridge may send. Behind NAT there is no IPv6.

use std::net::{IpAddr, Ipv6Addr};

use super::bpf::{Condition, Field, Program, ipv6_at, is, mac_at};
use super::{DESTINATION, ETHER_TYPE, Guard, IPV6, Place, stations};

const PAYLOAD_LENGTH: Field = Field::Half(18);
const NEXT_HEADER: Field = Field::Byte(20);
const FROM: u32 = 22;

const HOP_BY_HOP: u32 = 0;
const UDP: u32 = 17;
const ICMPV6: u32 = 58;
/// TCP, UDP, DCCP, GRE, ESP, SCTP and UDP-Lite. ICMPv6 has rules of its own. Extension headers,
/// which could hide it, are dropped.
const TRANSPORTS: [u32; 7] = [6, UDP, 33, 47, 50, 132, 136];

const ICMPV6_TYPE: Field = Field::Byte(54);
const ROUTER_SOLICITATION: u32 = 133;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
/// Errors and echoes.
const MESSAGES: [u32; 6] = [1, 2, 3, 4, 128, 129];
/// MLD's reports and leaves; only routers send queries.
const MLD_TYPES: [u32; 3] = [131, 132, 143];
const DHCP_SERVER: u32 = 547;

/// Options of neighbour discovery: their type, and a length of eight bytes.
const SOURCE_MAC: u32 = 0x0101;
const TARGET_MAC: u32 = 0x0201;
const NONCE: u32 = 0x0e01;

impl Guard<'_> {
    pub(super) fn ipv6(&self) -> Program {
        let Place::Bridge { addresses, .. } = &self.place else {
            return Program::default();
        };
        let own: Vec<Ipv6Addr> = addresses.iter().filter_map(ipv6_of).collect();
        let is_known = !addresses.is_empty();
        // Destination limits exist for IPv4 only, so limited guests may send no IPv6.
        if !self.egress.is_full() || (is_known && own.is_empty()) {
            return Program::default();
        }
        Program::when(is(ETHER_TYPE, IPV6), self.judge_ipv6(&own))
    }

    /// Builds the rules for IPv6. `own` lists the only addresses that the guest may use; empty
    /// means any.
    fn judge_ipv6(&self, own: &[Ipv6Addr]) -> Program {
        let group = Program::require(is(Field::Half(DESTINATION), 0x3333));
        let dhcp_server = vec![(NEXT_HEADER, UDP), (Field::Half(54), DHCP_SERVER)];
        Program::of([
            stations(group),
            Program::require(is(Field::ByteBits(14, 0xf0), 0x60)),
            source(own),
            Program::when(is(NEXT_HEADER, HOP_BY_HOP), mld()),
            Program::when(is(NEXT_HEADER, ICMPV6), self.discovery(own)),
            Program::when(unspecified(), Program::reject()),
            Program::when(is(NEXT_HEADER, ICMPV6), messages()),
            Program::require_value(NEXT_HEADER, &TRANSPORTS),
            Program::when(dhcp_server, Program::reject()),
            Program::accept(),
        ])
    }

    /// Accepts neighbour discovery messages of a station, and none of a router.
    fn discovery(&self, own: &[Ipv6Addr]) -> Program {
        const TARGET: u32 = 62;
        let target = if own.is_empty() {
            Program::default()
        } else {
            Program::require_one(own.iter().map(|&address| ipv6_at(TARGET, address)))
        };
        let solicitation = self.options(24, &[SOURCE_MAC], &[NONCE]);
        let advertisement = Program::of([target, self.options(24, &[TARGET_MAC], &[])]);
        let router_solicitation = self.options(8, &[SOURCE_MAC], &[]);
        let when = |kind, block| Program::when(is(ICMPV6_TYPE, kind), block);
        Program::of([
            when(ROUTER_SOLICITATION, router_solicitation),
            when(NEIGHBOUR_SOLICITATION, solicitation),
            when(NEIGHBOUR_ADVERTISEMENT, advertisement),
        ])
    }

    /// Accepts a message of `length` bytes without an option or with one: either one of `naming`,
    /// which contain a hardware address that must be the guest's, or one of `others`, which contain
    /// none.
    fn options(&self, length: u32, naming: &[u32], others: &[u32]) -> Program {
        let option = 54 + length;
        let with = |kind| vec![(PAYLOAD_LENGTH, length + 8), (Field::Half(option), kind)];
        let naming = naming
            .iter()
            .map(|&kind| [with(kind), mac_at(option + 2, self.mac)].concat());
        let others = others.iter().map(|&kind| with(kind));
        let none = is(PAYLOAD_LENGTH, length);
        Program::of([
            Program::require_one(naming.chain(others).chain([none])),
            Program::accept(),
        ])
    }
}

fn ipv6_of(address: &IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    }
}

fn unspecified() -> Condition {
    ipv6_at(FROM, Ipv6Addr::UNSPECIFIED)
}

/// Accepts a source only if it is in `own` or, if that is empty, not a multicast address. A station
/// without an address has none here.
fn source(own: &[Ipv6Addr]) -> Program {
    if own.is_empty() {
        return Program::when(is(Field::Byte(FROM), 0xff), Program::reject());
    }
    let own = own.iter().map(|&address| ipv6_at(FROM, address));
    Program::require_one(own.chain([unspecified()]))
}

/// Accepts group membership reports. This is the only use of a hop-by-hop header that is allowed: a
/// header of eight bytes, and the message after it.
fn mld() -> Program {
    Program::of([
        Program::require(vec![(Field::Byte(54), ICMPV6), (Field::Byte(55), 0)]),
        Program::require_value(Field::Byte(62), &MLD_TYPES),
        Program::accept(),
    ])
}

fn messages() -> Program {
    Program::of([
        Program::require_value(ICMPV6_TYPE, &MESSAGES),
        Program::accept(),
    ])
}
