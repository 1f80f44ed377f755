//! All results of a folder as one page of Markdown, with plots.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::plot;
use crate::record::Record;

/// Makes `report.md` and the plots from all `*.json` in `folder`; returns the report's path.
pub(crate) fn write(folder: &Path) -> Result<PathBuf> {
    let mut benches = Vec::new();
    let entries = fs::read_dir(folder);
    for entry in entries.with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            benches.push((name.into_owned(), read(&path)?));
        }
    }
    benches.sort_by(|a, b| a.0.cmp(&b.0));
    let mut text = String::from("# Benchmarks\n");
    for (name, record) in &benches {
        let plots = plot::draw_all(folder, name, record)?;
        section(&mut text, name, record, &plots);
    }
    let path = folder.join("report.md");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn read(path: &Path) -> Result<Record> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no result", path.display()))
}

fn section(text: &mut String, name: &str, record: &Record, plots: &[PathBuf]) {
    let mut add = |line: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    };
    add(format!("\n## {name}\n"));
    for sentence in &record.how {
        add(format!("- {sentence}"));
    }
    if let Some(machine) = &record.machine {
        add(format!(
            "- Machine: {}, {} cores, Linux {}; {}.",
            machine.cpu, machine.cores, machine.kernel, machine.kvm
        ));
    }
    for failure in &record.failures {
        add(format!("- Not measured: {failure}."));
    }
    add("\n| figure | unit | n | p50 | p99 | min |\n| --- | --- | --: | --: | --: | --: |".into());
    for figure in &record.figures {
        add(format!(
            "| {} | {} | {} | {:.2} | {:.2} | {:.2} |",
            figure.name, figure.unit, figure.n, figure.p50, figure.p99, figure.min
        ));
    }
    if !record.ratios.is_empty() {
        add("\n| ratio of medians | value | goal |\n| --- | --: | --- |".into());
    }
    for ratio in &record.ratios {
        let goal = ratio.goal.as_deref().unwrap_or("");
        add(format!("| {} | {:.3} | {goal} |", ratio.name, ratio.value));
    }
    for plot in plots {
        let file = plot.file_name().unwrap_or_default().to_string_lossy();
        add(format!("\n![{name}]({file})"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Figure;

    #[test]
    fn a_report_holds_every_result_and_refuses_what_is_none() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["boot", "exec"] {
            let mut record = Record::new(&["Measured thus."]);
            record.add(Figure::new("clone", "ms", vec![2.0]));
            record.add(Figure::new("QEMU", "ms", vec![4.0]));
            record.ratio("clone", "QEMU", Some("at most 1")).unwrap();
            record.part("bochs", |_| anyhow::bail!("it is gone"));
            let json = serde_json::to_string(&record).unwrap();
            fs::write(folder.path().join(format!("{name}.json")), json).unwrap();
        }
        let text = fs::read_to_string(write(folder.path()).unwrap()).unwrap();
        assert!(text.contains("## boot") && text.contains("## exec"));
        assert!(text.contains("| clone / QEMU | 0.500 | at most 1 |"));
        assert!(text.contains("- Not measured: bochs: it is gone."));
        assert!(text.contains("![exec](exec-ms.svg)"));
        fs::write(folder.path().join("other.json"), "{}").unwrap();
        let error = format!("{:#}", write(folder.path()).unwrap_err());
        assert!(error.contains("other.json"), "{error}");
    }
}
