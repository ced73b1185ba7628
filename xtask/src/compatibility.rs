//! COMPATIBILITY.md: takes its table and the test functions of the project, and gives every row that is missing, double,
//! of an unknown status, or claims a behaviour that no existing test shows; it judges form, never the claim itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::house::{self, House};
use crate::source;

/// Fails with everything that is wrong with the file.
pub(crate) fn check(house: &House) -> Result<()> {
    let text = fs::read_to_string(house.root.join(FILE)).context(FILE)?;
    let mut tests = BTreeSet::new();
    for path in house::rust_files(&house.root)? {
        tests.extend(source::test_functions(&fs::read_to_string(&path)?));
    }
    let faults = faults(&text, &tests);
    if !faults.is_empty() {
        bail!("{FILE}: {} faults\n  {}", faults.len(), faults.join("\n  "));
    }
    Ok(())
}

fn faults(text: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let expected = numbers();
    for (at, line) in text.lines().enumerate() {
        let line_number = at + 1;
        let Some(row) = line.trim().strip_prefix('|') else {
            continue;
        };
        let cells: Vec<&str> = row
            .trim_end_matches('|')
            .split('|')
            .map(str::trim)
            .collect();
        let [number, _words, status, shown_by] = cells.as_slice() else {
            faults.push(format!(
                "line {line_number}: a row has four cells, this one {}",
                cells.len()
            ));
            continue;
        };
        if !number.chars().any(|c| c.is_ascii_digit()) {
            continue; // the head of the table and the rule under it
        }
        if !expected.contains(*number) {
            faults.push(format!(
                "line {line_number}: no behaviour has the number `{number}`"
            ));
        } else if let Some(first) = seen.insert(number, line_number) {
            faults.push(format!(
                "line {line_number}: {number} was already on line {first}"
            ));
        }
        faults.extend(
            row_faults(status, shown_by, tests)
                .into_iter()
                .map(|fault| format!("line {line_number}: {number}: {fault}")),
        );
    }
    let missing: Vec<&str> = expected
        .iter()
        .map(String::as_str)
        .filter(|number| !seen.contains_key(number))
        .collect();
    if !missing.is_empty() {
        faults.push(format!("missing: {}", missing.join(" ")));
    }
    faults
}

fn row_faults(status: &str, shown_by: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let claims = match status {
        "same" => true,
        "not yet" => false,
        better
            if better
                .strip_prefix("better: ")
                .is_some_and(|how| !how.trim().is_empty()) =>
        {
            true
        }
        other => {
            return vec![format!(
                "status `{other}` is not `same`, `better: how` or `not yet`"
            )];
        }
    };
    // Between the first backtick and the second, between the third and the fourth, and so on.
    let named: Vec<&str> = shown_by.split('`').skip(1).step_by(2).collect();
    let mut faults: Vec<String> = named
        .iter()
        .filter(|name| !tests.contains(name.rsplit("::").next().unwrap_or(name)))
        .map(|name| format!("no test is called `{name}`"))
        .collect();
    if claims && named.is_empty() {
        faults.push(format!("`{status}` names no test"));
    }
    faults
}

/// The numbers of both lists of behaviours.
fn numbers() -> BTreeSet<String> {
    let wire = (1..=161).map(|number| number.to_string());
    let operations = (1..=140).map(|number| format!("B{number:03}"));
    wire.chain(operations).chain(["B104a".to_owned()]).collect()
}

const FILE: &str = "COMPATIBILITY.md";

#[cfg(test)]
mod tests {
    use super::*;

    fn table(change: impl Fn(&str) -> Option<String>) -> String {
        let rows = numbers().into_iter().filter_map(|number| change(&number));
        let head = "# Words\n\n| number | behaviour | status | shown by |\n|---|---|---|---|\n";
        head.to_owned() + &rows.collect::<String>()
    }

    fn row(number: &str) -> String {
        format!("| {number} | words | not yet | |\n")
    }

    fn found(text: &str) -> Vec<String> {
        faults(text, &BTreeSet::from(["a_test".to_owned()]))
    }

    #[test]
    fn a_whole_table_passes() {
        assert_eq!(
            found(&table(|number| Some(row(number)))),
            Vec::<String>::new()
        );
        let shown = |number: &str| {
            Some(format!(
                "| {number} | w | same | `room::a_test`, `a_test` |\n"
            ))
        };
        assert_eq!(found(&table(shown)), Vec::<String>::new());
    }

    #[test]
    fn a_missing_row_is_named() {
        let faults = found(&table(|number| {
            (number != "B104a" && number != "7").then(|| row(number))
        }));
        assert_eq!(faults, ["missing: 7 B104a"]);
    }

    #[test]
    fn a_row_that_comes_twice_or_from_nowhere_is_found() {
        let twice = |number: &str| Some(row(number).repeat(if number == "161" { 2 } else { 1 }));
        assert_eq!(found(&table(twice)).len(), 1);
        assert_eq!(
            found(&(table(|number| Some(row(number))) + &row("162"))).len(),
            1
        );
    }

    #[test]
    fn a_claim_needs_a_test_that_exists() {
        for (status, shown_by, count) in [
            ("same", "", 1),
            ("same", "`gone`", 1),
            ("same", "`a_test` `gone`", 1),
            ("better: refuses", "`a_test`", 0),
            ("better:", "`a_test`", 1),
            ("better", "`a_test`", 1),
            ("not yet", "", 0),
            ("yes", "`a_test`", 1),
        ] {
            let tests = BTreeSet::from(["a_test".to_owned()]);
            assert_eq!(
                row_faults(status, shown_by, &tests).len(),
                count,
                "{status} {shown_by}"
            );
        }
    }

    #[test]
    fn a_row_with_too_few_cells_is_found() {
        assert_eq!(
            found(&(table(|number| Some(row(number))) + "| 1 | x |\n")).len(),
            1
        );
    }
}
