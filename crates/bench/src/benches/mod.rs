//! The benches. A new one is a file here and a line in [`ALL`].

mod army;
mod block;
mod boot;
mod exec;
pub(crate) mod fleet;
mod fork;
mod list;
mod memory;
mod moving;
mod net;
mod place;
mod rewind;

use anyhow::Result;

use crate::context::Context;
use crate::record::Record;

/// One of them.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn(&Context) -> Result<Record>,
}

/// All, in the order in which they run.
pub(crate) const ALL: &[Bench] = &[
    Bench {
        name: "boot",
        about: boot::ABOUT,
        run: boot::run,
    },
    Bench {
        name: "memory",
        about: memory::ABOUT,
        run: memory::run,
    },
    Bench {
        name: "exec",
        about: exec::ABOUT,
        run: exec::run,
    },
    Bench {
        name: "fork",
        about: fork::ABOUT,
        run: fork::run,
    },
    Bench {
        name: "rewind",
        about: rewind::ABOUT,
        run: rewind::run,
    },
    Bench {
        name: "move",
        about: moving::ABOUT,
        run: moving::run,
    },
    Bench {
        name: "block",
        about: block::ABOUT,
        run: block::run,
    },
    Bench {
        name: "net",
        about: net::ABOUT,
        run: net::run,
    },
    Bench {
        name: "army",
        about: army::ABOUT,
        run: army::run,
    },
    Bench {
        name: "list",
        about: list::ABOUT,
        run: list::run,
    },
    Bench {
        name: "place",
        about: place::ABOUT,
        run: place::run,
    },
    Bench {
        name: "fleet",
        about: fleet::ABOUT,
        run: fleet::run,
    },
];

/// Those that are named; all where none is.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<&'static Bench>> {
    for name in names {
        anyhow::ensure!(
            ALL.iter().any(|bench| bench.name == name),
            "there is no bench {name:?}; there are {}",
            ALL.iter()
                .map(|bench| bench.name)
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    let wanted = |bench: &&Bench| names.is_empty() || names.iter().any(|name| name == bench.name);
    Ok(ALL.iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn benches_run_in_their_own_order_and_unknown_ones_are_refused() {
        let names = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            chosen(&words).map(|benches| benches.iter().map(|bench| bench.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["exec", "boot"]).unwrap(), ["boot", "exec"]);
        assert!(names(&[]).unwrap().len() >= 5);
        assert!(names(&["boot", "bot"]).is_err());
    }
}
