//! The plans of PostgreSQL, which depend on what the tables have: they are filled.

use sqlx::AnyConnection;

use super::*;
use crate::testing::Postgres;

/// Fills the tables that [`Records::fill`](crate::testing::Records::fill) does not.
const FILL: &str = "INSERT INTO events (id, time_ms, kind, subject, tenant, detail) \
     SELECT n, n, 'vm.running', 'fleet-' || n, 'tenant-' || (n % 50), '' \
     FROM generate_series(1, 20000) AS n; \
     INSERT INTO operations (id, tenant, kind, subject, state, request, owner, actor, created_ms, \
     updated_ms, ended_ms, idempotency_key) SELECT 'operation-' || n, 'tenant-' || (n % 50), \
     'create_vms', 'template-' || (n % 20), CASE WHEN n % 1000 = 0 THEN 'running' ELSE 'succeeded' END, \
     '{}', 'a', 'b', n, n, CASE WHEN n % 1000 = 0 THEN NULL ELSE n END, 'key-' || n \
     FROM generate_series(1, 20000) AS n";

/// The number of parameters of a statement.
fn parameters(statement: &str) -> usize {
    let numbers = statement.split('$').skip(1).filter_map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    numbers.max().unwrap_or(0)
}

/// Prepares a statement as the driver does, which tells the types of parameters. Here some of them have
/// to be found: what the database does not infer is a number.
async fn prepare(connection: &mut AnyConnection, statement: &str) {
    let count = parameters(statement);
    let mut last = None;
    for numbers in 0_u32..1 << count {
        if numbers.count_ones() > 2 {
            continue;
        }
        let of = |index: usize| match numbers >> index & 1 {
            1 => "BIGINT",
            _ => "unknown",
        };
        let types: Vec<&str> = (0..count).map(of).collect();
        let types = match count {
            0 => String::new(),
            _ => format!("({})", types.join(", ")),
        };
        let prepare = format!("PREPARE examined {types} AS {statement}");
        let prepared = sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection);
        match prepared.await {
            Ok(_) => return,
            Err(error) => last = Some(error),
        }
    }
    panic!("{statement}: {last:?}");
}

/// The lines of the plan for a statement whose parameters are not known.
async fn plan(connection: &mut AnyConnection, statement: &str) -> Vec<String> {
    prepare(connection, statement).await;
    let nulls = vec!["NULL"; parameters(statement)].join(", ");
    let execute = match nulls.is_empty() {
        true => "EXPLAIN EXECUTE examined".to_owned(),
        false => format!("EXPLAIN EXECUTE examined({nulls})"),
    };
    let lines = sqlx::raw_sql(AssertSqlSafe(execute)).fetch_all(&mut *connection);
    let lines = lines.await.unwrap();
    let end = sqlx::raw_sql("DEALLOCATE examined").execute(&mut *connection);
    end.await.unwrap();
    lines.iter().map(|line| line.try_get(0).unwrap()).collect()
}

/// A step of a plan that reads a table or an index.
struct Scan {
    line: String,
    /// What it reads from end to end, where it has no condition.
    table: String,
    index: Option<String>,
    has_condition: bool,
}

impl Scan {
    fn of(line: &str) -> Option<Self> {
        let line = line.trim().trim_start_matches("->").trim();
        let (kind, rest) = line.split_once(" Scan ")?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let after = |word: &str| {
            let at = words.iter().position(|it| *it == word)?;
            words.get(at + 1).map(|it| (*it).to_owned())
        };
        let on = after("on")?;
        let (table, index) = match kind {
            // What follows is an index, whose name begins with that of its table.
            "Bitmap Index" => (on.split('_').next()?.to_owned(), Some(on)),
            _ => (on, after("using")),
        };
        Some(Self {
            line: line.to_owned(),
            table,
            index,
            // A heap is read where the bitmap says.
            has_condition: kind == "Bitmap Heap",
        })
    }

    fn is_slow(&self) -> bool {
        let is_small = |index: &String| SMALL.contains(&index.as_str());
        LARGE.contains(&self.table.as_str())
            && !self.has_condition
            && !self.index.as_ref().is_some_and(is_small)
    }
}

/// The steps of a plan that read a large table, or an index of it, from end to end.
fn slow_scans(plan: &[String]) -> Vec<String> {
    let mut scans: Vec<Scan> = Vec::new();
    let mut is_of_scan = false;
    for line in plan {
        if line.contains("(cost=") {
            let scan = Scan::of(line);
            is_of_scan = scan.is_some();
            scans.extend(scan);
        } else if let Some(scan) = scans.last_mut().filter(|_| is_of_scan) {
            scan.has_condition |= line.trim().starts_with("Index Cond:");
        }
    }
    let slow = scans.into_iter().filter(Scan::is_slow);
    slow.map(|scan| scan.line).collect()
}

#[test]
fn a_scan_is_slow_that_has_no_condition_of_an_index() {
    let slow = |plan: &str| slow_scans(&plan.lines().map(str::to_owned).collect::<Vec<_>>());
    let whole = "Limit  (cost=1..2)\n  ->  Seq Scan on vms them  (cost=1..2)\n        Filter: x";
    assert_eq!(slow(whole), ["Seq Scan on vms them  (cost=1..2)"]);
    let index = "Index Only Scan Backward using vms_number_key on vms  (cost=1..2)";
    assert_eq!(slow(index), [index]);
    assert!(slow(&format!("{index}\n  Index Cond: (number > $1)")).is_empty());
    let bitmap = "Bitmap Heap Scan on vms  (cost=1..2)\n  ->  Bitmap Index Scan on ";
    assert!(slow(&format!("{bitmap}vms_of_hosts  (cost=1..2)")).is_empty());
    assert_eq!(slow(&format!("{bitmap}vms_changed  (cost=1..2)")).len(), 1);
    assert!(slow("Seq Scan on tenants  (cost=1..2)").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_statement_finds_its_rows_by_an_index_of_postgresql() {
    let postgres = Postgres::start(std::path::Path::new("/tmp"), &["-F"]).unwrap();
    let postgres = postgres.expect("PostgreSQL is missing: cargo xtask setup");
    let url = postgres.create_database("army").unwrap();
    let store = Store::open(&url).await.unwrap();
    store.fill(100, 2000, 20_000).await.unwrap();
    let mut connection = store.pool.acquire().await.unwrap();
    for statement in [
        FILL,
        "VACUUM ANALYZE",
        "SET plan_cache_mode = force_generic_plan",
    ] {
        let done = sqlx::raw_sql(statement).execute(&mut *connection).await;
        done.unwrap();
    }
    let statements = all_statements(true);
    assert!(statements.len() > 80, "{} were found", statements.len());
    let mut slow = Vec::new();
    for statement in &statements {
        let plan = plan(&mut connection, statement).await;
        let scans = slow_scans(&plan).into_iter();
        slow.extend(scans.map(|scan| format!("{scan}: {statement}")));
    }
    assert_eq!(slow, [""; 0]);
}
