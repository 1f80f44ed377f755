//! Pages of VMs.

use army_api::vms::{Vm, VmFilter, VmPage};
use serde::Deserialize;
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

/// The query of a page of VMs as one JSON text: $1 is the number that precedes it, $2 the number of
/// VMs, $3 to $5 are the tenant, the template and the host, $6 is the states and $7 and $8 are patterns
/// of labels. A row of the driver for all databases
/// takes some 20 us and a switch of threads; as rows, 10,000 VMs take twice the time that their list
/// may take.
pub(super) fn page_query(is_postgres: bool, conditions: &Conditions) -> String {
    // The database's names for the functions that make an object and an array.
    let (object, array) = match is_postgres {
        true => ("json_build_object", "json_agg"),
        false => ("json_object", "json_group_array"),
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
        "SELECT CAST(COALESCE({array}({object}('number', number, 'vm', \
         {object}('id', id, 'name', name, 'tenant', tenant, 'template', COALESCE(template_name, template), 'host', host, \
         'state', state, 'reason', reason, 'labels', json(labels), 'created_ms', created_ms, \
         'expires_ms', CASE WHEN expires_ms < 0 THEN 9223372036854775807 ELSE expires_ms END, \
         'network', json(network), 'idle', json(idle), 'fork', json(fork), \
         'addresses', json(COALESCE(addresses, '[]')), \
         'notices', json(COALESCE(notices, '[]')), 'memory', json(memory)))), '[]') AS TEXT) AS page \
         FROM (SELECT * FROM vms WHERE {condition} ORDER BY number LIMIT $2) AS them"
    )
}

/// A VM of a page. It is `None` where its record cannot be read.
#[derive(Deserialize)]
struct Listed {
    number: i64,
    vm: Option<Vm>,
}

/// The VMs of a page, as the database wrote it. A record that cannot be read is logged and left out.
fn listed(page: &str) -> Result<Vec<Listed>> {
    if let Ok(listed) = serde_json::from_str(page) {
        return Ok(listed);
    }
    // The slower way is taken only where a record is bad.
    let rows: Vec<serde_json::Value> = parse(page)?;
    let listed = rows.into_iter().map(|row| {
        let number = row["number"].as_i64().unwrap_or(0);
        let read = serde_json::from_value::<Listed>(row);
        read.unwrap_or_else(|error| {
            tracing::error!(number, %error, "the record of a VM cannot be read and is left out");
            Listed { number, vm: None }
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
            let (count, last) = (listed.len(), listed.last().map(|last| last.number));
            let vms = listed
                .into_iter()
                .filter_map(|it| Some((it.number, it.vm?)));
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
