//! Network policies, as the host is told them.

use army_api::vms::{Egress, NetworkPolicy};
use army_api::{Problem, ProblemKind};
use clone_api::Ipv4Network;
use clone_api::config::Egress as HostEgress;

use crate::Result;

/// Whom a guest may send to by a policy.
///
/// # Errors
/// [`ProblemKind::InvalidRequest`] where it names something that is no network, or too many.
pub fn egress(policy: &NetworkPolicy) -> Result<HostEgress> {
    let invalid = |detail: String| Problem::new(ProblemKind::InvalidRequest, detail);
    Ok(match &policy.egress {
        Egress::Full => HostEgress::Full,
        Egress::None => HostEgress::None,
        Egress::Allow(networks) if networks.len() > HostEgress::MAX_NETWORKS => {
            let most = HostEgress::MAX_NETWORKS;
            return Err(invalid(format!(
                "{} networks are allowed, and {most} can be",
                networks.len()
            )));
        }
        Egress::Allow(networks) => {
            let networks = networks.iter().map(|it| it.parse::<Ipv4Network>());
            let networks: std::result::Result<_, _> = networks.collect();
            HostEgress::Allow(networks.map_err(|error| invalid(error.to_string()))?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_networks_and_not_too_many() {
        let allow = |networks: Vec<String>| {
            egress(&NetworkPolicy {
                egress: Egress::Allow(networks),
            })
        };
        let host = allow(vec!["10.0.0.0/8".into(), "192.0.2.7".into()]).unwrap();
        let HostEgress::Allow(networks) = host else {
            panic!("{host:?}")
        };
        assert_eq!(networks[1].to_string(), "192.0.2.7/32");
        for wrong in ["10.0.0.1/8", "example.org", "::/0"] {
            let problem = allow(vec![wrong.into()]).unwrap_err();
            assert!(problem.detail.contains(wrong), "{problem}");
        }
        assert!(allow(vec!["10.0.0.0/8".into(); 65]).is_err());
    }
}
