//! What the comparison with the active adds to a verification.

use std::time::Duration;

use coldspare_core::compare::{Difference, Found, How, LeftOut};
use coldspare_core::{Problem, ProblemKind, RelPath, RootId, Seq};
use coldspare_standby::Verdict;
use serde_json::{Value, json};

use super::Healed;

/// What both sides say of one changeset.
#[derive(Debug, Clone)]
pub(crate) struct Compared {
    /// The changeset.
    pub(crate) seq: Seq,
    /// What differs.
    pub(crate) found: Found,
    /// What wasn't compared, for a good reason.
    pub(crate) left_out: Vec<LeftOut>,
    /// How long it took once both stood at the changeset.
    pub(crate) took: Duration,
}

/// Why nothing was compared.
#[derive(Debug, Clone)]
pub(crate) struct NotCompared(pub(crate) String);

/// Counts what differs from the active among the problems, and what of `differed` doesn't any more among what was repaired.
/// Where nothing can be compared any more, it counts as different still.
pub(crate) fn add_differences(healed: &mut Healed, compared: &Result<Compared, NotCompared>, differed: &[Difference]) {
    let left = compared.as_ref().map_or(differed, |compared| &compared.found.differences);
    let is_left = |d: &&Difference| left.iter().any(|l| (l.root, &l.path) == (d.root, &d.path));
    if let Some(repair) = &mut healed.repair {
        repair.repaired.extend(differed.iter().filter(|d| !is_left(d)).map(problem));
        repair.repaired.sort();
        repair.repaired.dedup();
    }
    let verified = &mut healed.found.verification;
    verified.problems.extend(left.iter().map(problem));
    verified.problems.sort();
    verified.problems.dedup();
    if verified.verdict == Verdict::Consistent && !left.is_empty() {
        verified.verdict = Verdict::Differs;
    }
}

fn problem(Difference { root, path, how }: &Difference) -> Problem {
    let detail = match how {
        How::Differs => "the active sent it with other attributes or content than the manifest has",
        How::OnlyHere => "the manifest has it, the active doesn't",
        How::OnlyThere => "the active sent it, the manifest doesn't have it",
    };
    Problem { root: *root, path: path.clone(), kind: ProblemKind::Unequal, detail: detail.into() }
}

/// As `--json` prints it.
pub(crate) fn to_json(compared: &Result<Compared, NotCompared>, roots: &[String]) -> Value {
    let place = |root: RootId, path: &RelPath| json!({"root": roots.get(usize::from(root.0)), "path": path.to_string()});
    let Compared { seq, found, left_out, took } = match compared {
        Ok(compared) => compared,
        Err(NotCompared(why)) => return json!({"compared": false, "why": why}),
    };
    let difference = |d: &Difference| {
        let mut value = place(d.root, &d.path);
        value["how"] = json!(match d.how {
            How::Differs => "differs",
            How::OnlyHere => "only on the standby",
            How::OnlyThere => "only on the active",
        });
        value
    };
    json!({
        "compared": true,
        "seq": seq.0,
        "entries": found.entries,
        "differences": found.differences.iter().map(difference).collect::<Vec<_>>(),
        "more": found.has_more,
        "left_out": left_out.iter().map(|l| place(l.root, &l.path)).collect::<Vec<_>>(),
        "seconds": (took.as_secs_f64() * 1000.0).round() / 1000.0,
    })
}

/// The line for people.
pub(crate) fn line(active: &Value) -> String {
    if active["compared"] != true {
        return format!("active: not compared: {}", active["why"].as_str().unwrap_or_default());
    }
    let count = |what: &str| active[what].as_array().map_or(0, Vec::len);
    let more = if active["more"] == true { "more than " } else { "" };
    let without = match count("left_out") {
        0 => String::new(),
        n => format!(", without {n} paths that are held back or are to be sent again"),
    };
    let (seq, entries, differences) = (&active["seq"], &active["entries"], count("differences"));
    format!("active: compared at changeset {seq}: {entries} entries, {more}{differences} differences{without}")
}
