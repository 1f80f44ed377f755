//! The range of addresses of guests behind the bridge, and their assignment to guests.
//!
//! The host is the first address of the range; the guest of slot n has the n-th. A guest's
//! hardware address is made from its address, so both are unique on the host together.

use std::fmt;
use std::net::Ipv4Addr;

use clone_api::MacAddr;
use serde::{Deserialize, Serialize};

use super::HostNetError;

/// The first slot of a guest; the network's own address and the host's come first.
pub(super) const FIRST_SLOT: u16 = 2;

/// The ranges to try, in this order: rarely used ones, the large ones first.
const CANDIDATES: [(Ipv4Addr, u8); 6] = [
    (Ipv4Addr::new(10, 213, 0, 0), 16),
    (Ipv4Addr::new(10, 219, 0, 0), 16),
    (Ipv4Addr::new(172, 29, 0, 0), 16),
    (Ipv4Addr::new(10, 197, 0, 0), 16),
    (Ipv4Addr::new(192, 168, 213, 0), 24),
    (Ipv4Addr::new(192, 168, 219, 0), 24),
];

/// A network of IPv4 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    network: Ipv4Addr,
    prefix: u8,
}

impl Range {
    /// The private network of `network` with a `prefix` of 16 to 28 bits.
    ///
    /// # Errors
    /// [`HostNetError::BadRange`] if the network is not private, or its size is not supported.
    pub fn new(network: Ipv4Addr, prefix: u8) -> Result<Self, HostNetError> {
        let range = Self { network, prefix };
        if !(16..=28).contains(&prefix)
            || !network.is_private()
            || network.to_bits() & !range.mask() != 0
        {
            return Err(HostNetError::BadRange {
                address: network,
                prefix,
            });
        }
        Ok(range)
    }

    /// The first of the usual ranges that overlaps none of `taken` (address and prefix length).
    pub(super) fn first_free(taken: &[(Ipv4Addr, u8)]) -> Result<Self, HostNetError> {
        CANDIDATES
            .into_iter()
            .map(|(network, prefix)| Self { network, prefix })
            .find(|range| !taken.iter().any(|&other| range.overlaps(other)))
            .ok_or_else(|| {
                let names: Vec<_> = CANDIDATES
                    .iter()
                    .map(|(network, prefix)| format!("{network}/{prefix}"))
                    .collect();
                HostNetError::NoFreeRange(names.join(", "))
            })
    }

    fn overlaps(&self, (address, prefix): (Ipv4Addr, u8)) -> bool {
        let mask = mask(prefix.min(self.prefix));
        (address.to_bits() ^ self.network.to_bits()) & mask == 0
    }

    fn mask(&self) -> u32 {
        mask(self.prefix)
    }

    /// The prefix length in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The netmask.
    pub fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.mask())
    }

    /// The host's own address, which is the guests' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        self.at(1)
    }

    /// The address of the guest of slot `slot`.
    pub(super) fn at(&self, slot: u16) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | u32::from(slot))
    }

    /// The slot of the guest with this address; `None` for an address that no guest can have.
    pub(super) fn slot_of(&self, address: Ipv4Addr) -> Option<u16> {
        let host = address.to_bits() & !self.mask();
        let slot = u16::try_from(host).ok()?;
        let is_guests = (FIRST_SLOT..=self.last_slot()).contains(&slot);
        (is_guests && self.at(slot) == address).then_some(slot)
    }

    /// The last slot whose address is not the broadcast address.
    pub(super) fn last_slot(&self) -> u16 {
        // The prefix has at least 16 bits, so the host part fits 16 bits.
        (!self.mask() - 1) as u16
    }

    /// The hardware address of the host's own address. It is the same on all hosts with this range,
    /// so guests that move between them need not ask for it again.
    pub(super) fn gateway_mac(&self) -> MacAddr {
        let [a, b, c, d] = self.gateway().octets();
        MacAddr([0x02, 0xc1, a, b, c, d])
    }
}

impl fmt::Display for Range {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.network, self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_in_use_is_stepped_over() {
        let first = Range::first_free(&[]).unwrap();
        assert_eq!(first.to_string(), "10.213.0.0/16");
        let inside = (Ipv4Addr::new(10, 213, 7, 0), 24);
        let around = (Ipv4Addr::new(10, 213, 0, 0), 12);
        for taken in [inside, around] {
            assert_ne!(Range::first_free(&[taken]).unwrap(), first);
        }
        let other = (Ipv4Addr::new(10, 214, 0, 0), 16);
        assert_eq!(Range::first_free(&[other]).unwrap(), first);
        let all = [
            (Ipv4Addr::new(0, 0, 0, 0), 1),
            (Ipv4Addr::new(128, 0, 0, 0), 1),
        ];
        assert!(Range::first_free(&all).is_err());
    }

    #[test]
    fn guests_get_neither_the_hosts_nor_the_broadcast_address() {
        let range = Range::new(Ipv4Addr::new(192, 168, 5, 0), 24).unwrap();
        assert_eq!(range.gateway(), Ipv4Addr::new(192, 168, 5, 1));
        assert_eq!(range.at(FIRST_SLOT), Ipv4Addr::new(192, 168, 5, 2));
        assert_eq!(range.at(range.last_slot()), Ipv4Addr::new(192, 168, 5, 254));
        assert_eq!(range.slot_of(Ipv4Addr::new(192, 168, 5, 7)), Some(7));
        for address in [[192, 168, 5, 1], [192, 168, 5, 255], [192, 168, 6, 7]] {
            assert_eq!(range.slot_of(address.into()), None);
        }
        let large = Range::new(Ipv4Addr::new(10, 213, 0, 0), 16).unwrap();
        assert_eq!(
            large.at(large.last_slot()),
            Ipv4Addr::new(10, 213, 255, 254)
        );
        assert_eq!(large.netmask(), Ipv4Addr::new(255, 255, 0, 0));
    }

    #[test]
    fn unfit_ranges_are_refused() {
        for (network, prefix) in [
            (Ipv4Addr::new(8, 8, 0, 0), 16),
            (Ipv4Addr::new(10, 0, 0, 0), 8),
            (Ipv4Addr::new(10, 0, 0, 0), 30),
            (Ipv4Addr::new(10, 0, 0, 1), 24),
        ] {
            assert!(Range::new(network, prefix).is_err());
        }
    }

    #[test]
    fn the_gateways_hardware_address_tells_its_address() {
        let range = Range::new(Ipv4Addr::new(10, 213, 0, 0), 16).unwrap();
        assert_eq!(range.gateway_mac().to_string(), "02:c1:0a:d5:00:01");
    }
}
