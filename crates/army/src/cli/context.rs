//! The server that requests are sent to, the key, and how responses are shown.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use army_api::Client;
use army_api::client::exposes_key;
use clap::Args;
use serde::Serialize;

use super::output;

/// The address where `army dev` listens by default.
pub(super) const DEFAULT_URL: &str = "http://127.0.0.1:7777";

#[derive(Args)]
pub(super) struct Options {
    /// The URL of the server.
    #[arg(long, global = true, env = "ARMY_URL", default_value = DEFAULT_URL)]
    url: String,
    /// The key to authenticate with.
    #[arg(long, global = true, env = "ARMY_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Trust only servers whose certificate is signed by one of the authorities in this PEM file.
    #[arg(long, global = true, value_name = "FILE", env = "ARMY_CA")]
    ca: Option<PathBuf>,
    /// Send the key to a server over plain HTTP, even if it is on another host: everybody on the way
    /// can read the key.
    #[arg(
        long,
        global = true,
        env = "ARMY_ALLOW_PLAIN_HTTP",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    allow_plain_http: bool,
    /// Print answers in JSON.
    #[arg(long, global = true)]
    json: bool,
}

/// The context of every client command.
pub(super) struct Context {
    options: Options,
}

impl Context {
    pub(super) fn new(options: Options) -> Self {
        Self { options }
    }

    pub(super) fn client(&self) -> Result<Client> {
        let key = self.options.key.as_deref().context(
            "there is no key: set ARMY_KEY to what `army dev` printed, or to one of `army key create`",
        )?;
        let url = &self.options.url;
        anyhow::ensure!(
            self.options.allow_plain_http || !exposes_key(url),
            "{url} is plain HTTP, and would show your key to everybody on the way: use https, or \
             give --allow-plain-http"
        );
        let Some(path) = &self.options.ca else {
            return Ok(Client::new(&self.options.url, key)?);
        };
        let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Client::believing(&self.options.url, key, &pem)?)
    }

    pub(super) fn is_json(&self) -> bool {
        self.options.json
    }

    /// Shows an answer: as JSON, or as `text` makes it.
    pub(super) fn show<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        if self.options.json {
            output::print(&serde_json::to_string_pretty(value)?);
        } else {
            output::print(&text(value));
        }
        Ok(())
    }
}
