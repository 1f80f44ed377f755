//! Users and groups, from `/etc/passwd` and `/etc/group`.

use std::fs;

use agent_proto::messages::ErrorCode;

use crate::session::Refusal;

/// Whom a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// Finds `user`, `user:group`, or numbers; root where empty.
pub(crate) fn find(wanted: &str) -> Result<User, Refusal> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    find_in(wanted, &read("/etc/passwd"), &read("/etc/group"))
}

fn find_in(wanted: &str, passwd: &str, group: &str) -> Result<User, Refusal> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let known = passwd
        .lines()
        .filter_map(parse_user)
        .find(|user| match number {
            Some(uid) => user.uid == uid,
            None => user.name == name,
        });
    let mut user = match (known, number) {
        (Some(user), _) => user,
        // A number without an entry is a user all the same, as in containers.
        (None, Some(uid)) => nameless(uid),
        (None, None) => {
            return Err(Refusal::new(
                ErrorCode::NotFound,
                format!("no user {name} in the guest"),
            ));
        }
    };
    user.groups = group
        .lines()
        .filter_map(|line| member_group(line, &user.name))
        .collect();
    if let Some(group_name) = group_name {
        user.gid = find_group(group_name, group).ok_or_else(|| {
            Refusal::new(
                ErrorCode::NotFound,
                format!("no group {group_name} in the guest"),
            )
        })?;
    }
    Ok(user)
}

fn nameless(uid: u32) -> User {
    let home = if uid == 0 { "/root" } else { "/" };
    User {
        name: if uid == 0 {
            "root".to_owned()
        } else {
            uid.to_string()
        },
        uid,
        gid: uid,
        groups: Vec::new(),
        home: home.to_owned(),
        shell: "/bin/sh".to_owned(),
    }
}

/// `name:password:uid:gid:comment:home:shell`
fn parse_user(line: &str) -> Option<User> {
    let fields: Vec<_> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else {
        return None;
    };
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: home.to_owned(),
        shell: if shell.is_empty() {
            "/bin/sh".to_owned()
        } else {
            shell.to_owned()
        },
    })
}

/// The id of a group that `user` is a member of; `name:password:gid:members`.
fn member_group(line: &str, user: &str) -> Option<u32> {
    let fields: Vec<_> = line.split(':').collect();
    let [_, _, gid, members] = fields[..] else {
        return None;
    };
    members
        .split(',')
        .any(|member| member == user)
        .then(|| gid.parse().ok())?
}

fn find_group(wanted: &str, group: &str) -> Option<u32> {
    if let Ok(gid) = wanted.parse() {
        return Some(gid);
    }
    group.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields.first() == Some(&wanted)).then(|| fields.get(2)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nada:x:1000:1000::/home/ada:\nbroken\n";
    const GROUP: &str = "root:x:0:\nkvm:x:104:ada,bob\nvideo:x:44:bob\n";

    fn user(wanted: &str) -> Result<User, String> {
        find_in(wanted, PASSWD, GROUP).map_err(|refusal| refusal.message)
    }

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let ada = user("ada").unwrap();
        assert_eq!(
            (ada.uid, ada.gid, ada.groups.as_slice()),
            (1000, 1000, &[104][..])
        );
        assert_eq!(ada.shell, "/bin/sh");
        assert_eq!(user("1000").unwrap(), ada);
        assert_eq!(user("").unwrap().name, "root");
    }

    #[test]
    fn a_group_may_be_chosen() {
        assert_eq!(user("ada:video").unwrap().gid, 44);
        assert_eq!(user("7:9").unwrap().gid, 9);
    }

    #[test]
    fn who_does_not_exist_is_named() {
        assert_eq!(user("eve").unwrap_err(), "no user eve in the guest");
        assert_eq!(user("ada:eve").unwrap_err(), "no group eve in the guest");
    }
}
