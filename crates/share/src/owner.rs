//! Owners: who the guest's files belong to on the host, and the host's in the guest.
//!
//! The server is one user without any privilege, the owner of the shared directory. So everything
//! that a guest makes belongs to that user, whichever user of the guest made it, and the guest
//! reaches what that user may reach. In the guest, that user appears as one chosen user (root, by
//! default), and all others as nobody.

/// The user and group that stand for all that have no counterpart.
pub(crate) const NOBODY: u32 = 65_534;

/// The host's user and group that serve a share, and the guest's that they appear as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    host: (u32, u32),
    guest: (u32, u32),
}

impl Owner {
    /// The user and group of this process, which appear as these of the guest.
    pub fn of_this_process(guest: (u32, u32)) -> Self {
        let user = rustix::process::geteuid().as_raw();
        let group = rustix::process::getegid().as_raw();
        Self {
            host: (user, group),
            guest,
        }
    }

    /// The user and group that the guest sees for those of a file.
    pub(crate) fn in_guest(self, user: u32, group: u32) -> (u32, u32) {
        let seen = |host, own, guest| if host == own { guest } else { NOBODY };
        (
            seen(user, self.host.0, self.guest.0),
            seen(group, self.host.1, self.guest.1),
        )
    }

    /// Whether a file with these host's ids belongs, after a change of owner in the guest to these
    /// ids, to whom it belongs already. No other change can be made.
    pub(crate) fn is_unchanged(
        self,
        (user, group): (u32, u32),
        (new_user, new_group): (Option<u32>, Option<u32>),
    ) -> bool {
        let now = self.in_guest(user, group);
        new_user.is_none_or(|new| new == now.0) && new_group.is_none_or(|new| new == now.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_user_appears_as_the_chosen_one_and_all_others_as_nobody() {
        let owner = Owner {
            host: (1000, 100),
            guest: (0, 7),
        };
        assert_eq!(owner.in_guest(1000, 100), (0, 7));
        assert_eq!(owner.in_guest(0, 7), (NOBODY, NOBODY));
        assert!(owner.is_unchanged((1000, 100), (Some(0), None)));
        assert!(!owner.is_unchanged((1000, 100), (Some(1000), None)));
        assert!(!owner.is_unchanged((0, 0), (None, Some(0))));
    }
}
