//! Users and groups, from `/etc/passwd` and `/etc/group`.
//!
//! Names and numbers have the same meaning as in container engines: a number needs no entry, and
//! then has group 0; an explicit group replaces the user's own ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use agent_proto::messages::ErrorCode;

use crate::conversation::Refusal;

/// The shell of users whose entry names none (passwd(5)).
const DEFAULT_SHELL: &str = "/bin/sh";
/// Shells that images have, the most comfortable first.
const COMMON_SHELLS: [&str; 4] = ["/bin/bash", DEFAULT_SHELL, "/bin/ash", "/busybox/sh"];
/// The programs that replace a shell for users who may not log in.
const NO_LOGIN: [&str; 3] = ["nologin", "false", "true"];

/// A user or group id. It is never -1, which system calls take as "leave unchanged", so that the
/// command would stay root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id(u32);

impl Id {
    const ROOT: Self = Self(0);

    fn new(number: u32) -> Option<Self> {
        (number != u32::MAX).then_some(Self(number))
    }

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().and_then(Self::new)
    }

    pub(crate) fn get(self) -> u32 {
        self.0
    }
}

/// The user that a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: Id,
    pub(crate) gid: Id,
    /// Supplementary groups.
    pub(crate) groups: Vec<Id>,
    pub(crate) home: String,
    shell: String,
}

impl User {
    /// A shell that runs: the user's own, or one of the guest's where the user's is missing or there
    /// to keep people out. Who may come in is decided on the host.
    pub(crate) fn shell(&self) -> Option<String> {
        let listed = || fs::read_to_string("/etc/shells").unwrap_or_default();
        self.shell_among(listed, is_program)
    }

    fn shell_among(
        &self,
        listed: impl FnOnce() -> String,
        is_program: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let runs = |shell: &&str| !keeps_out(shell) && is_program(shell);
        let mut usual = [self.shell.as_str()].into_iter().chain(COMMON_SHELLS);
        let usual = usual.find(runs).map(str::to_owned);
        usual.or_else(|| {
            let listed = listed();
            let mut shells = listed.lines().filter(|line| line.starts_with('/'));
            shells.find(runs).map(str::to_owned)
        })
    }
}

fn keeps_out(shell: &str) -> bool {
    let name = Path::new(shell).file_name().and_then(|name| name.to_str());
    name.is_none_or(|name| NO_LOGIN.contains(&name))
}

fn is_program(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}

/// Finds `user`, `user:group`, or numbers; root where empty.
pub(crate) fn find(wanted: &str) -> Result<User, Refusal> {
    let read = |path| fs::read(path).unwrap_or_default();
    let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
    // One name in another encoding must not make all users unreadable.
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    find_in(wanted, &text(&passwd), &text(&group))
}

fn find_in(wanted: &str, passwd: &str, group: &str) -> Result<User, Refusal> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let mut user = find_user(if name.is_empty() { "0" } else { name }, passwd)?;
    match group_name {
        Some(name) => user.gid = find_group(name, group)?,
        None => user.groups = groups_of(&user.name, group)?,
    }
    Ok(user)
}

fn find_user(name: &str, passwd: &str) -> Result<User, Refusal> {
    let mut entries = passwd.lines().filter_map(Entry::parse);
    if !is_number(name) {
        let entry = entries.find(|entry| entry.name == name);
        return entry
            .ok_or_else(|| not_found("user", name))
            .and_then(|entry| entry.user());
    }
    let uid = Id::parse(name).ok_or_else(|| no_id("user", name))?;
    match entries.find(|entry| Id::parse(entry.uid) == Some(uid)) {
        Some(entry) => entry.user(),
        // A number without an entry is a user all the same, as in containers.
        None => Ok(nameless(uid)),
    }
}

/// Whether the text consists of digits, even if it is not a valid id.
fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn not_found(what: &str, name: &str) -> Refusal {
    Refusal::new(
        ErrorCode::NotFound,
        format!("no {what} {name} in the guest"),
    )
}

fn no_id(what: &str, text: &str) -> Refusal {
    let most = u32::MAX - 1;
    let message = format!("{text} is not a {what} id: ids are 0 to {most}");
    Refusal::new(ErrorCode::Invalid, message)
}

fn damaged(file: &str, name: &str, id: &str) -> Refusal {
    let message = format!("{file} in the guest gives {name} the id {id:?}, which is none");
    Refusal::new(ErrorCode::Invalid, message)
}

fn nameless(uid: Id) -> User {
    let (name, home) = match uid {
        Id::ROOT => ("root".to_owned(), "/root"),
        Id(number) => (number.to_string(), "/"),
    };
    User {
        name,
        uid,
        gid: Id::ROOT,
        groups: Vec::new(),
        home: home.to_owned(),
        shell: DEFAULT_SHELL.to_owned(),
    }
}

/// A line of `/etc/passwd`: `name:password:uid:gid:comment:home:shell`
struct Entry<'a> {
    name: &'a str,
    uid: &'a str,
    gid: &'a str,
    home: &'a str,
    shell: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else {
            return None;
        };
        Some(Self {
            name,
            uid,
            gid,
            home,
            shell,
        })
    }

    fn user(&self) -> Result<User, Refusal> {
        let id = |text| Id::parse(text).ok_or_else(|| damaged("/etc/passwd", self.name, text));
        Ok(User {
            name: self.name.to_owned(),
            uid: id(self.uid)?,
            gid: id(self.gid)?,
            groups: Vec::new(),
            home: self.home.to_owned(),
            shell: match self.shell {
                "" => DEFAULT_SHELL.to_owned(),
                shell => shell.to_owned(),
            },
        })
    }
}

/// The groups that `user` is a member of; lines of `/etc/group`: `name:password:gid:members`
fn groups_of(user: &str, group: &str) -> Result<Vec<Id>, Refusal> {
    let mut groups = Vec::new();
    for line in group.lines() {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, gid, members] = fields[..] else {
            continue;
        };
        if members.split(',').any(|member| member == user) {
            groups.push(Id::parse(gid).ok_or_else(|| damaged("/etc/group", name, gid))?);
        }
    }
    Ok(groups)
}

fn find_group(wanted: &str, group: &str) -> Result<Id, Refusal> {
    if is_number(wanted) {
        return Id::parse(wanted).ok_or_else(|| no_id("group", wanted));
    }
    let gid = group.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields.first() == Some(&wanted)).then(|| fields.get(2).copied())?
    });
    let gid = gid.ok_or_else(|| not_found("group", wanted))?;
    Id::parse(gid).ok_or_else(|| damaged("/etc/group", wanted, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nada:x:1000:1000::/home/ada:\nbroken\n\
        all:x:4294967295:7::/:\nminus:x:-1:9::/:\nlarge:x:8:4294967296::/:\n\
        web:x:33:33::/var/www:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\nkvm:x:104:ada,bob\nvideo:x:44:bob\nbad:x:4294967295:web\n";

    fn user(wanted: &str) -> Result<User, String> {
        find_in(wanted, PASSWD, GROUP).map_err(|refusal| refusal.message)
    }

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let ada = user("ada").unwrap();
        let groups = [Id(104)].as_slice();
        assert_eq!(
            (ada.uid, ada.gid, ada.groups.as_slice()),
            (Id(1000), Id(1000), groups)
        );
        assert_eq!(user("1000").unwrap(), ada);
        assert_eq!(user("").unwrap().name, "root");
    }

    #[test]
    fn a_group_may_be_chosen_and_then_is_the_only_one() {
        let ada = user("ada:video").unwrap();
        assert_eq!((ada.gid, ada.groups), (Id(44), Vec::new()));
        assert_eq!(user("7:9").unwrap().gid, Id(9));
    }

    #[test]
    fn a_number_that_the_image_does_not_know_has_group_0() {
        let nobody = user("12345").unwrap();
        assert_eq!((nobody.uid, nobody.gid), (Id(12345), Id(0)));
        assert_eq!((nobody.home.as_str(), nobody.name.as_str()), ("/", "12345"));
    }

    #[test]
    fn who_does_not_exist_is_named() {
        assert_eq!(user("eve").unwrap_err(), "no user eve in the guest");
        assert_eq!(user("ada:eve").unwrap_err(), "no group eve in the guest");
    }

    #[test]
    fn an_id_that_system_calls_take_for_no_change_is_nobody_s() {
        for wanted in ["4294967295", "-1", "+4294967295", "4294967296", "ada:-1"] {
            let message = user(wanted).unwrap_err();
            assert!(message.contains("ids are 0 to"), "{wanted}: {message}");
        }
        for wanted in ["all", "minus", "large", "web", "ada:bad", "5:4294967295"] {
            assert!(user(wanted).is_err(), "{wanted} is somebody");
        }
        assert_eq!(user("4294967294").unwrap().uid, Id(u32::MAX - 1));
    }

    #[test]
    fn a_shell_that_keeps_people_out_or_is_missing_is_replaced_by_one_that_runs() {
        let with = |shell: &str| User {
            shell: shell.to_owned(),
            ..nameless(Id(5))
        };
        let there =
            |path: &str| ["/bin/sh", "/usr/sbin/nologin", "/bin/false", "/bin/zsh"].contains(&path);
        let listed = || "# all\n/opt/sh\n".to_owned();
        let shell = |own: &str| with(own).shell_among(listed, there).unwrap();
        assert_eq!(shell("/bin/zsh"), "/bin/zsh");
        for own in ["/usr/sbin/nologin", "/bin/false", "/no/shell", ""] {
            assert_eq!(shell(own), "/bin/sh", "{own}");
        }
        let odd = with("/bin/sh").shell_among(listed, |path| path == "/opt/sh");
        assert_eq!(odd.unwrap(), "/opt/sh");
        assert_eq!(with("/bin/sh").shell_among(listed, |_| false), None);
    }
}
