//! `army template build`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use army_api::builds::{BuildEvent, BuildStep, BuildTemplate};
use army_api::client::ClientError;
use army_api::templates::Template;
use clap::{ArgMatches, FromArgMatches};
use futures_util::StreamExt;

use super::context::Context;
use super::output::note;
use super::output::pair;

/// The names of the options for steps, in clap.
const RUN: &str = "run";
const WRITE: &str = "write";

/// Build a template from another one, by running commands and writing files in a clone of it.
#[derive(clap::Args)]
struct Options {
    /// The new template's name.
    name: String,
    /// The template to start from, or a tag.
    #[arg(long)]
    from: String,
    /// A command for the guest's shell, which must exit with 0; can be given several times.
    #[arg(id = RUN, long, value_name = "COMMAND")]
    run: Vec<String>,
    /// A text file to write in the guest, in order with the commands; can be given several times.
    #[arg(id = WRITE, long, value_name = "FILE:PATH", value_parser = file)]
    write: Vec<(PathBuf, String)>,
    /// An environment variable for the commands, KEY=VALUE; can be given several times.
    #[arg(long = "env", short, value_parser = pair)]
    environment: Vec<(String, String)>,
    /// Use only hosts with this label, KEY=VALUE; can be given several times.
    #[arg(long = "on", value_name = "KEY=VALUE", value_parser = pair)]
    host_labels: Vec<(String, String)>,
    /// The time limit for all steps together, in seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// The options, and the order in which the steps among them were given.
pub(super) struct Args {
    options: Options,
    order: Vec<Step>,
}

#[derive(Clone, Copy)]
enum Step {
    Run(usize),
    Write(usize),
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut order: Vec<(usize, Step)> = Vec::new();
        for (option, step) in [(RUN, Step::Run as fn(usize) -> Step), (WRITE, Step::Write)] {
            let places = matches.indices_of(option).into_iter().flatten();
            order.extend(places.enumerate().map(|(nth, place)| (place, step(nth))));
        }
        order.sort_by_key(|(place, _)| *place);
        Ok(Self {
            options: Options::from_arg_matches(matches)?,
            order: order.into_iter().map(|(_, step)| step).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        Options::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Options::augment_args_for_update(command)
    }
}

/// The path in the VM is absolute: it begins at the first `:/`, so that the file's name may hold colons.
fn file(text: &str) -> Result<(PathBuf, String), String> {
    let divided = text
        .find(":/")
        .map(|colon| (&text[..colon], &text[colon + 1..]));
    let (file, path) = divided
        .filter(|(file, _)| !file.is_empty())
        .ok_or("write it as FILE:PATH, with an absolute PATH")?;
    Ok((file.into(), path.to_owned()))
}

pub(super) async fn run(context: &Context, args: Args) -> Result<Template> {
    let Args { options, order } = args;
    let mut steps = Vec::with_capacity(order.len());
    for step in order {
        steps.push(match step {
            Step::Run(nth) => BuildStep::Run {
                command: vec!["/bin/sh".into(), "-ec".into(), options.run[nth].clone()],
                directory: None,
                user: None,
            },
            Step::Write(nth) => {
                let (file, path) = &options.write[nth];
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("cannot read {} as text", file.display()))?;
                BuildStep::Write {
                    path: path.clone(),
                    text,
                    mode: None,
                }
            }
        });
    }
    let count = steps.len();
    let titles: Vec<String> = steps.iter().map(title).collect();
    let request = BuildTemplate {
        template: options.name,
        from: options.from,
        steps,
        environment: options.environment.into_iter().collect(),
        host_labels: options.host_labels.into_iter().collect(),
        timeout_s: options.timeout,
    };
    let events = context
        .client()?
        .post_stream("/v1/builds", &request)
        .await?;
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event? {
            BuildEvent::Step { number } => {
                let title = titles
                    .get(number.wrapping_sub(1))
                    .map_or("", String::as_str);
                note(&format!("step {number} of {count}: {title}"));
            }
            // The standard output is for the template, which a program may read.
            BuildEvent::Output { text, .. } => std::io::stderr().write_all(text.as_bytes())?,
            BuildEvent::Built { template } => return Ok(*template),
            BuildEvent::Failed { problem } => return Err(ClientError::Refused(problem).into()),
        }
    }
    bail!("the server went away; `army operation ls` tells what became of the build")
}

fn title(step: &BuildStep) -> String {
    let text = match step {
        BuildStep::Run { command, .. } => command.last(),
        BuildStep::Write { path, .. } => Some(path),
    };
    let line = text.and_then(|text| text.lines().next());
    line.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_done_in_the_order_in_which_they_are_given() {
        let command = <Args as clap::Args>::augment_args(clap::Command::new("build"));
        let line = [
            "build", "new", "--run", "one", "--from", "base", "--write", "a:/b", "--run", "two",
        ];
        let matches = command.try_get_matches_from(line).unwrap();
        let args = Args::from_arg_matches(&matches).unwrap();
        let order = args.order.iter().map(|step| match *step {
            Step::Run(nth) => args.options.run[nth].clone(),
            Step::Write(nth) => args.options.write[nth].1.clone(),
        });
        assert_eq!(order.collect::<Vec<_>>(), ["one", "/b", "two"]);
    }

    #[test]
    fn a_file_to_write_may_have_colons_in_its_name() {
        let pair = |file: &str, path: &str| (PathBuf::from(file), path.to_owned());
        assert_eq!(file("./a:b:/etc/x:/y").unwrap(), pair("./a:b", "/etc/x:/y"));
        for wrong in ["a", "a:b", ":/b"] {
            assert!(file(wrong).is_err(), "{wrong}");
        }
    }
}
