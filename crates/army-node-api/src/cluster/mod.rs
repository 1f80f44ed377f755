//! How the processes of one cluster trust each other.
//!
//! The controller has a certificate [`authority`] of its own. Every process has a certificate of it
//! that says what the process is: the controller, or the node of one host. A host gets its first
//! certificate for a [`token`] that is valid for minutes, and has it renewed later. All connections
//! are mutual TLS ([`tls`]). Addresses prove nothing, and names in certificates are not looked up
//! anywhere.

pub mod authority;
pub mod tls;
pub mod token;

/// The controller's name in its certificate.
const CONTROLLER: &str = "controller.army.internal";
/// The suffix of a host's name in its node's certificate.
const NODE: &str = ".node.army.internal";

/// A process of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Member {
    /// The controller.
    Controller,
    /// The node of the host of this name.
    Node(String),
}

impl Member {
    /// The member's name in its certificate.
    pub fn dns_name(&self) -> String {
        match self {
            Self::Controller => CONTROLLER.to_owned(),
            Self::Node(host) => format!("{host}{NODE}"),
        }
    }

    fn of_dns_name(name: &str) -> Option<Self> {
        if name == CONTROLLER {
            return Some(Self::Controller);
        }
        let host = name.strip_suffix(NODE)?;
        is_host_name(host).then(|| Self::Node(host.to_owned()))
    }
}

/// Whether a host can have this name: one label of a domain name, in lower case.
pub fn is_host_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_recognized_by_their_names() {
        for member in [Member::Controller, Member::Node("a-1".into())] {
            assert_eq!(Member::of_dns_name(&member.dns_name()), Some(member));
        }
        for name in [
            "",
            "army.internal",
            ".node.army.internal",
            "a.b.node.army.internal",
            "A.node.army.internal",
        ] {
            assert_eq!(Member::of_dns_name(name), None, "{name}");
        }
    }
}
