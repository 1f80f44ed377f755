//! Sizes and addresses as people write them.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes. Written as a number or with a unit of 1024: `512M`, `2G`, `64KiB`.
///
/// Serialised as a number; read from a number or a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` times 1024 bytes.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// `n` times 1024² bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` times 1024³ bytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

/// A text that is no size or address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("`{0}` is not a size: write a whole number of bytes or a unit, as in 512M or 2G")]
    Size(String),
    /// A size past 2⁶⁴ bytes.
    #[error("`{0}` is larger than any memory or disk")]
    TooLarge(String),
    /// Not a MAC address.
    #[error("`{0}` is not a MAC address: write six hexadecimal pairs, as in 02:c1:00:00:00:01")]
    Mac(String),
    /// Not a network.
    #[error(
        "`{0}` is not an IPv4 network: write its first address and the bits that all have in common, as in 10.0.0.0/8"
    )]
    Network(String),
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Size(text.to_owned());
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(wrong());
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let too_large = || UnitError::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number
            .checked_mul(1 << shift)
            .map(Bytes)
            .ok_or_else(too_large)
    }
}

impl fmt::Display for Bytes {
    /// The largest unit that gives a whole number, as in `512M`; what is printed can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size, as in 1048576 or \"512M\"")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Bytes, E> {
                Ok(Bytes(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Bytes, E> {
                u64::try_from(value)
                    .map(Bytes)
                    .map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Bytes, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A hardware address of a network interface, as in `02:c1:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether the address names a group (multicast or broadcast) and so cannot be a station's.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// An address for one of our guests, locally administered, made from five random bytes.
    pub fn from_random(random: [u8; 5]) -> Self {
        let [a, b, c, d, e] = random;
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for MacAddr {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Mac(text.to_owned());
        let mut address = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut address {
            let pair = pairs.next().ok_or_else(wrong)?;
            let hexadecimal = pair.bytes().all(|c| c.is_ascii_hexdigit());
            if pair.len() != 2 || !hexadecimal {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        match pairs.next() {
            None => Ok(Self(address)),
            Some(_) => Err(wrong()),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Addresses that begin alike: an IPv4 network, written as `10.0.0.0/8`; one address alone is `/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv4Network {
    address: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Network {
    /// Its first address.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// How many bits its addresses have in common, 0 to 32.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether it lies within 169.254.0.0/16, the link-local addresses.
    pub fn is_link_local(self) -> bool {
        self.prefix >= 16 && self.address.is_link_local()
    }

    /// Whether all of `other` is in it. Two networks have all of one in common or nothing.
    pub fn contains(self, other: Self) -> bool {
        self.prefix <= other.prefix
            && (self.address.to_bits() ^ other.address.to_bits()) & mask(self.prefix) == 0
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl FromStr for Ipv4Network {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Network(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) if prefix.bytes().all(|c| c.is_ascii_digit()) => {
                (address, prefix.parse().map_err(|_| wrong())?)
            }
            Some(_) => return Err(wrong()),
            None => (text, 32),
        };
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        // `10.0.0.1/8` may be meant as one or the other.
        if prefix > 32 || address.to_bits() & !mask(prefix) != 0 {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Serialize for Ipv4Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ipv4Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod schema {
    use std::borrow::Cow;

    use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

    use super::{Bytes, Ipv4Network, MacAddr};

    impl JsonSchema for Bytes {
        fn schema_name() -> Cow<'static, str> {
            "Bytes".into()
        }

        fn json_schema(_: &mut SchemaGenerator) -> Schema {
            json_schema!({
                "description": "A number of bytes, or a text with a unit of 1024 (\"512M\"). Answers always give the number.",
                "oneOf": [
                    { "type": "integer", "format": "uint64", "minimum": 0 },
                    { "type": "string", "pattern": "^[0-9]+([KMGTkmgt]([Ii]?[Bb])?|[Bb])?$" }
                ]
            })
        }
    }

    impl JsonSchema for Ipv4Network {
        fn schema_name() -> Cow<'static, str> {
            "Ipv4Network".into()
        }

        fn json_schema(_: &mut SchemaGenerator) -> Schema {
            json_schema!({
                "description": "An IPv4 network; one address alone has 32 bits.",
                "type": "string",
                "pattern": "^[0-9]{1,3}(\\.[0-9]{1,3}){3}(/[0-9]{1,2})?$"
            })
        }
    }

    impl JsonSchema for MacAddr {
        fn schema_name() -> Cow<'static, str> {
            "MacAddr".into()
        }

        fn json_schema(_: &mut SchemaGenerator) -> Schema {
            json_schema!({
                "description": "A hardware address.",
                "type": "string",
                "pattern": "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$"
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64k", 64 << 10),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("1TB", 1 << 40),
        ] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "12Q",
            "1 M",
            "0x10",
            "99999999999999999999",
            "16777216T",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_mac_address_is_refused() {
        for text in [
            "",
            "02:c1:00:00:00",
            "02:c1:00:00:00:01:02",
            "02:c1:00:00:00:+1",
            "2:c1:0:0:0:1",
            "02-c1-00-00-00-01",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_are_read_as_they_are_meant_or_not_at_all() {
        let network = |text: &str| text.parse::<Ipv4Network>();
        assert_eq!(network("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        for wrong in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0/8",
            "::/0",
        ] {
            assert!(network(wrong).is_err(), "{wrong}");
        }
        let [all, ten, one] =
            ["0.0.0.0/0", "10.0.0.0/8", "10.1.2.3"].map(|it| network(it).unwrap());
        assert!(all.contains(ten) && ten.contains(one) && one.contains(one));
        assert!(!one.contains(ten) && !network("11.0.0.0/8").unwrap().contains(one));
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_back_the_same(bytes: u64, shift in 0_u32..50) {
            let size = Bytes(bytes >> shift << shift);
            prop_assert_eq!(size.to_string().parse::<Bytes>().unwrap(), size);
        }

        #[test]
        fn a_printed_mac_address_reads_back_the_same(address: [u8; 6]) {
            let address = MacAddr(address);
            prop_assert_eq!(address.to_string().parse::<MacAddr>().unwrap(), address);
        }

        #[test]
        fn a_printed_network_reads_back_the_same(address: u32, prefix in 0_u8..=32) {
            let address = Ipv4Addr::from_bits(address & mask(prefix));
            let network = Ipv4Network { address, prefix };
            prop_assert_eq!(network.to_string().parse::<Ipv4Network>().unwrap(), network);
        }

        #[test]
        fn no_text_makes_the_size_parser_panic(text in ".*") {
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<Ipv4Network>();
            let _ = text.parse::<MacAddr>();
        }
    }
}
