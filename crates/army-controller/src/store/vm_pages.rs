//! Pages of VMs.

use std::collections::BTreeMap;

use army_api::vms::{
    ForkTimes, IdlePolicy, NetworkPolicy, Vm, VmFilter, VmMemory, VmPage, VmState,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use sqlx::AssertSqlSafe;

use super::labels::LabelFilter;
use super::{Store, parse, query_failed, text, word};
use crate::{Error, ErrorKind, Result};

/// The number of VMs of a page, where the client does not say.
const PAGE: u32 = 1000;

/// The conditions of a page. Those that are not asked for are left out of the query, so that the
/// database finds the others by an index.
pub(super) struct Conditions {
    /// VMs that have ended, too.
    pub(super) all: bool,
    pub(super) tenant: bool,
    pub(super) template: bool,
    pub(super) host: bool,
    /// VMs in some states only, whether they have ended or not.
    pub(super) states: bool,
    /// The number of labels that the database looks at.
    pub(super) labels: usize,
}

/// The query of a page of VMs as one JSON text, an array of [`Listed`]: $1 is the number that
/// precedes it, $2 the number of VMs, $3 to $5 are the tenant, the template and the host, $6 is the
/// states and $7 and $8 are patterns of labels.
///
/// As rows, 10,000 VMs take twice the time that their list may take: the driver for all databases
/// takes some 20 us for each, and a switch of threads. Columns that hold JSON are texts in it, which
/// are read here: PostgreSQL takes three times as long for a page that it writes as objects of objects.
pub(super) fn page_query(is_postgres: bool, conditions: &Conditions) -> String {
    // The database's names for the functions that make an array of values and one of rows.
    let (values, rows) = match is_postgres {
        true => ("json_build_array", "json_agg"),
        false => ("json_array", "json_group_array"),
    };
    let mut condition = "number > $1".to_owned();
    let texts = [
        (conditions.tenant, "tenant = $3", "$3 = ''"),
        (conditions.template, "template = $4", "$4 = ''"),
        (conditions.host, "host = $5", "$5 = ''"),
        (
            conditions.states,
            "$6 LIKE '%,' || state || ',%'",
            "$6 = ''",
        ),
        (
            conditions.labels > 0,
            "labels LIKE $7 ESCAPE '!'",
            "$7 = ''",
        ),
        (
            conditions.labels > 1,
            "labels LIKE $8 ESCAPE '!'",
            "$8 = ''",
        ),
    ];
    for (wanted, given, absent) in texts {
        condition.push_str(" AND ");
        condition.push_str(if wanted { given } else { absent });
    }
    if !conditions.all && !conditions.states {
        condition.push_str(" AND alive = 1");
    }
    format!(
        "SELECT CAST(COALESCE({rows}({values}(number, id, name, tenant, \
         COALESCE(template_name, template), host, state, reason, labels, created_ms, \
         CASE WHEN expires_ms < 0 THEN 9223372036854775807 ELSE expires_ms END, \
         network, idle, fork, addresses, notices, memory)), '[]') AS TEXT) AS page \
         FROM (SELECT * FROM vms WHERE {condition} ORDER BY number LIMIT $2) AS them"
    )
}

/// A VM of a page: the values that [`page_query`] asks for, in its order.
#[derive(Deserialize)]
struct Listed {
    number: i64,
    id: String,
    name: String,
    tenant: String,
    template: String,
    host: String,
    state: VmState,
    reason: Option<String>,
    labels: Json<BTreeMap<String, String>>,
    created_ms: u64,
    expires_ms: Option<u64>,
    network: Option<Json<Option<NetworkPolicy>>>,
    idle: Option<Json<Option<IdlePolicy>>>,
    fork: Option<Json<Option<ForkTimes>>>,
    addresses: Option<Json<Vec<String>>>,
    notices: Option<Json<Vec<String>>>,
    memory: Option<Json<Option<VmMemory>>>,
}

/// A value that is a text of JSON within JSON.
struct Json<T>(T);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Json<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = serde_json::from_str(&text).map_err(serde::de::Error::custom)?;
        Ok(Self(value))
    }
}

impl Listed {
    fn into_vm(self) -> Vm {
        Vm {
            id: self.id,
            name: self.name,
            tenant: self.tenant,
            template: self.template,
            host: self.host,
            state: self.state,
            reason: self.reason,
            labels: self.labels.0,
            created_ms: self.created_ms,
            expires_ms: self.expires_ms,
            network: self.network.and_then(|it| it.0),
            idle: self.idle.and_then(|it| it.0),
            fork: self.fork.and_then(|it| it.0),
            addresses: self.addresses.map(|it| it.0).unwrap_or_default(),
            notices: self.notices.map(|it| it.0).unwrap_or_default(),
            memory: self.memory.and_then(|it| it.0),
        }
    }
}

/// A VM of a page with its number. There is no VM where its record cannot be read.
type Numbered = (i64, Option<Vm>);

/// The VMs of a page, as the database wrote it. A record that cannot be read is logged and left out.
fn listed(page: &str) -> Result<Vec<Numbered>> {
    let numbered = |it: Listed| (it.number, Some(it.into_vm()));
    if let Ok(listed) = serde_json::from_str::<Vec<Listed>>(page) {
        return Ok(listed.into_iter().map(numbered).collect());
    }
    // The slower way is taken only where a record is bad.
    let rows: Vec<serde_json::Value> = parse(page)?;
    let listed = rows.into_iter().map(|row| {
        let number = row[0].as_i64().unwrap_or(0);
        let read = serde_json::from_value::<Listed>(row);
        read.map(numbered).unwrap_or_else(|error| {
            tracing::error!(number, %error, "the record of a VM cannot be read and is left out");
            (number, None)
        })
    });
    Ok(listed.collect())
}

impl Store {
    /// A page of VMs, of one tenant or of all.
    pub(crate) async fn vms(&self, filter: &VmFilter, tenant: Option<&str>) -> Result<VmPage> {
        let limit = filter.limit.unwrap_or(PAGE).clamp(1, 10_000);
        let after = match &filter.after {
            None => 0,
            Some(after) => {
                let number = after.parse::<i64>().ok().filter(|number| *number >= 0);
                number.ok_or_else(|| {
                    let message = "`after` must be the `next` of a page";
                    Error::new(ErrorKind::InvalidRequest, message)
                })?
            }
        };
        let labels = LabelFilter::of(&filter.label)?;
        let states = filter.state.iter().map(word).collect::<Result<Vec<_>>>()?;
        let conditions = Conditions {
            all: filter.all,
            tenant: tenant.is_some(),
            template: filter.template.is_some(),
            host: filter.host.is_some(),
            states: !states.is_empty(),
            labels: filter.label.len(),
        };
        let states = match states.is_empty() {
            true => String::new(),
            false => format!(",{},", states.join(",")),
        };
        let query = page_query(self.is_postgres, &conditions);
        // One VM more shows whether there is a next page.
        let wanted = limit as usize + 1;
        let mut found: Vec<(i64, Vm)> = Vec::new();
        let mut position = after;
        // What the database finds is nearly always what is looked for. The page is filled where it
        // is not, or where a record cannot be read.
        while found.len() < wanted {
            // It is made of the texts of this file alone.
            let row = sqlx::query(AssertSqlSafe(query.clone()))
                .bind(position)
                .bind(i64::from(limit) + 1)
                .bind(tenant.unwrap_or_default())
                .bind(filter.template.as_deref().unwrap_or_default())
                .bind(filter.host.as_deref().unwrap_or_default())
                .bind(&states)
                .bind(labels.pattern(0))
                .bind(labels.pattern(1))
                .fetch_one(&self.pool)
                .await
                .map_err(query_failed)?;
            let listed = listed(&text(&row, "page")?)?;
            let (count, last) = (listed.len(), listed.last().map(|(number, _)| *number));
            let vms = listed
                .into_iter()
                .filter_map(|(number, vm)| Some((number, vm?)));
            found.extend(vms.filter(|(_, vm)| labels.matches(vm)));
            match last.filter(|last| count == wanted && *last > position) {
                Some(last) => position = last,
                None => break,
            }
        }
        let more = found.len() >= wanted;
        found.truncate(limit as usize);
        let last = found.last().filter(|_| more);
        Ok(VmPage {
            next: last.map(|(number, _)| number.to_string()),
            vms: found.into_iter().map(|(_, vm)| vm).collect(),
        })
    }
}
