//! What a bench found, as it is written to `NAME.json`.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::context::Context;

/// What a bench found.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What was measured and how, a sentence each.
    pub(crate) how: Vec<String>,
    pub(crate) figures: Vec<Figure>,
    pub(crate) ratios: Vec<Ratio>,
    /// Parts that could not be measured, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) failures: Vec<String>,
    pub(crate) machine: Option<Machine>,
}

/// Something that was measured several times.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    /// `ms`, `us`, `MiB/s`, `KiB`.
    pub(crate) unit: String,
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) min: f64,
    /// In the order in which they were taken.
    pub(crate) samples: Vec<f64>,
}

/// One figure's median over another's, or over a goal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) name: String,
    pub(crate) value: f64,
    /// What it should be, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) goal: Option<String>,
}

/// Where it was measured.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) kvm: String,
    pub(crate) cores: usize,
}

impl Figure {
    /// `samples` must not be empty.
    pub(crate) fn new(name: &str, unit: &str, samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            n: samples.len(),
            p50: percentile(&sorted, 50),
            p99: percentile(&sorted, 99),
            min: sorted.first().copied().unwrap_or(f64::NAN),
            samples,
        }
    }

    /// Times in milliseconds.
    pub(crate) fn ms(name: &str, times: &[Duration]) -> Self {
        let samples = times.iter().map(|time| time.as_secs_f64() * 1e3);
        Self::new(name, "ms", samples.collect())
    }
}

/// The smallest sample that is not below `percent` of all (nearest rank).
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

impl Record {
    pub(crate) fn new(how: &[&str]) -> Self {
        Self {
            how: how.iter().map(|&text| text.to_owned()).collect(),
            ..Self::default()
        }
    }

    /// Adds a figure, and prints it: a long bench shows how far it is.
    pub(crate) fn add(&mut self, figure: Figure) {
        println!("{figure}");
        self.figures.push(figure);
    }

    /// Adds a figure, and the ratio of its median to what it is to stay below.
    pub(crate) fn add_with_limit(&mut self, figure: Figure, limit: f64, goal: &str) {
        let ratio = Ratio {
            name: format!("{} / {limit} {}", figure.name, figure.unit),
            value: figure.p50 / limit,
            goal: Some(goal.to_owned()),
        };
        self.add(figure);
        self.add_ratio(ratio);
    }

    /// Boots a guest of another VMM's: on an emulated CPU some hang now and then; that is told, and
    /// the boot tried once more.
    pub(crate) fn twice<T>(&mut self, vmm: &str, boot: impl Fn() -> Result<T>) -> Result<T> {
        boot().or_else(|error| {
            let told = format!("A boot of {vmm}'s was tried again: {error:#}.");
            println!("   {told}");
            self.how.push(told);
            boot()
        })
    }

    /// Measures a part of a bench. Where it fails, what others found is kept, and the bench has
    /// failed all the same.
    pub(crate) fn part(&mut self, name: &str, measure: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = measure(self) {
            let failure = format!("{name}: {error:#}");
            println!("   failed: {failure}");
            self.failures.push(failure);
        }
    }

    /// Adds a ratio, and prints it.
    pub(crate) fn add_ratio(&mut self, ratio: Ratio) {
        println!("{ratio}");
        self.ratios.push(ratio);
    }

    /// Adds the ratio of the medians of two figures, which must be there.
    pub(crate) fn ratio(&mut self, ours: &str, theirs: &str, goal: Option<&str>) -> Result<()> {
        let p50 = |name: &str| {
            let figure = self.figures.iter().find(|figure| figure.name == name);
            figure
                .map(|figure| figure.p50)
                .with_context(|| format!("there is no figure {name:?} for a ratio"))
        };
        self.add_ratio(Ratio {
            name: format!("{ours} / {theirs}"),
            value: p50(ours)? / p50(theirs)?,
            goal: goal.map(str::to_owned),
        });
        Ok(())
    }

    /// Writes it to the results' folder.
    pub(crate) fn save(&self, name: &str, context: &Context) -> Result<PathBuf> {
        let mut value = serde_json::to_value(self)?;
        value["machine"] = serde_json::to_value(machine(context)?)?;
        let path = context.out().join(format!("{name}.json"));
        fs::write(&path, serde_json::to_string_pretty(&value)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            unit,
            n,
            p50,
            p99,
            min,
            ..
        } = self;
        write!(
            f,
            "   {name:<40} p50 {p50:>10.2} {unit}, p99 {p99:.2}, min {min:.2}, n {n}"
        )
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "   {}: {:.3}", self.name, self.value)?;
        match &self.goal {
            Some(goal) => write!(f, " (goal: {goal})"),
            None => Ok(()),
        }
    }
}

fn machine(context: &Context) -> Result<Machine> {
    let read = |path| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let cpus = read("/proc/cpuinfo")?;
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": "));
    Ok(Machine {
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpu: model.map_or("unknown", |(_, name)| name).to_owned(),
        kvm: context.kvm().to_owned(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_and_ratios_are_of_medians() {
        let mut record = Record::default();
        record.add(Figure::new("ours", "ms", vec![3.0, 1.0, 2.0]));
        let hundred = (1..=200).map(f64::from).collect();
        record.add(Figure::new("theirs", "ms", hundred));
        let theirs = &record.figures[1];
        assert_eq!((theirs.p50, theirs.p99, theirs.min), (100.0, 198.0, 1.0));
        assert_eq!(record.figures[0].p50, 2.0);
        assert_eq!(record.figures[0].samples, [3.0, 1.0, 2.0]);
        record.ratio("ours", "theirs", Some("at most 1")).unwrap();
        assert_eq!(record.ratios[0].value, 0.02);
        assert!(record.ratio("ours", "nobody", None).is_err());
    }

    #[test]
    fn a_part_that_fails_takes_nothing_with_it() {
        let mut record = Record::default();
        record.part("ours", |record| {
            record.add(Figure::new("ours", "ms", vec![1.0]));
            Ok(())
        });
        record.part("theirs", |record| record.ratio("ours", "theirs", None));
        assert_eq!(record.figures.len(), 1);
        assert_eq!(
            record.failures,
            ["theirs: there is no figure \"theirs\" for a ratio"]
        );
    }
}
