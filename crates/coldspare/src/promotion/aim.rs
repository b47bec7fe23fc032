//! Promotion to an earlier point: which one, what that gives up, and the way there and back.
//!
//! Going there is durable by itself and finished after a kill ([`coldspare_standby::Standby::rewind`]): who asks again finds
//! the standby at the point. What is given up is in a quarantine before the role is stored (G5).

use coldspare_standby::{GivenUp, Point, PointNo, fitting};
use serde_json::{Value, json};

use super::{Terms, refused};
use crate::active::rfc3339;
use crate::exit::Failure;
use crate::standby::{Copy, points};

/// LIMIT: what a person is shown of a list; the object has all.
const SHOWN_MAX: usize = 20;

/// The point that is to be promoted.
pub(super) struct Aim {
    point: Point,
    given_up: GivenUp,
    /// Where the standby was; `None` when it was at the point.
    from: Option<PointNo>,
}

impl Aim {
    /// The point that the terms name, or at which a person holds the standby; `None` when there is none.
    ///
    /// # Errors
    /// `Usage`, `Differs`: there is no such point, or none fits the database. `Damage`.
    pub(super) fn of(copy: &Copy, terms: &Terms) -> Result<Option<Aim>, Failure> {
        let all = copy.points().map_err(Failure::damage)?;
        let no = match (&terms.to, &terms.database_position, copy.rewound()) {
            (None, None, None) => return Ok(None),
            (None, None, Some(no)) => no,
            (Some(to), ..) => points::find(copy, to)?,
            (None, Some(position), _) => fitting(&all, position).map(|point| point.no).map_err(|nearest| unfit(position, &nearest))?,
        };
        let unknown = || refused(format!("there is no point {no}; `coldspare points` lists them"));
        let point = all.iter().find(|point| point.no == no).cloned().ok_or_else(unknown)?;
        let last = all.last().map_or(no, |point| point.no);
        let is_there = last == no || copy.rewound() == Some(no);
        let given_up = copy.given_up(no).map_err(Failure::damage)?;
        Ok(Some(Aim { point, given_up, from: (!is_there).then_some(last) }))
    }

    /// Milliseconds since 1970: as of when the point is known to lack nothing, on the active's clock.
    pub(super) fn as_of_ms(&self) -> Option<u64> {
        Some(self.point.applied.as_of_ms).filter(|ms| *ms > 0)
    }

    /// Brings the standby to the point, if it isn't there.
    ///
    /// # Errors
    /// `Damage`, `Differs`: the tree is as it was.
    pub(super) fn go(&self, copy: &Copy) -> Result<(), Failure> {
        if self.from.is_some() {
            tracing::warn!(point = self.point.no.0, "the standby goes back to the point that is to be promoted");
            copy.rewind(self.point.no).map_err(Failure::damage)?;
        }
        Ok(())
    }

    /// Brings it back to where it was, after a promotion that did not come about; where it is, if that fails.
    pub(super) fn come_back(&self, copy: &Copy, failure: Failure) -> Failure {
        match self.from.map(|from| copy.rewind(from)) {
            None | Some(Ok(_)) => failure,
            Some(Err(e)) => {
                let no = self.point.no;
                Failure { message: format!("{}; the standby stays at point {no}: {e}", failure.message), ..failure }
            }
        }
    }

    /// Keeps what is given up; what there is to say of it.
    ///
    /// # Errors
    /// `Damage`.
    pub(super) fn give_up(&self, copy: &Copy) -> Result<Value, Failure> {
        let kept = copy.keep_given_up().map_err(Failure::damage)?;
        let mut said = self.to_json();
        said["quarantine"] = json!(kept);
        Ok(said)
    }

    pub(super) fn to_json(&self) -> Value {
        let Aim { point, given_up: GivenUp { points, repositories }, .. } = self;
        json!({
            "to": point.no.0,
            "position": point.position,
            "points": points.iter().map(shown).collect::<Vec<_>>(),
            "repositories": repositories.iter().map(|(root, path)| json!({"root": root.0, "path": path.to_string()})).collect::<Vec<_>>(),
        })
    }
}

fn shown(point: &Point) -> Value {
    let as_of = Some(point.applied.as_of_ms).filter(|ms| *ms > 0).unwrap_or(point.at_ms);
    json!({"point": point.no.0, "seq": point.applied.seq.0, "as_of": rfc3339(as_of), "position": point.position})
}

fn unfit(position: &str, nearest: &[&Point]) -> Failure {
    let nearest: Vec<String> = nearest.iter().map(|point| described(&shown(point))).collect();
    let near = match nearest.as_slice() {
        [] => "no point has a position: set database.position on the standby, for the next time".to_string(),
        some => format!("the nearest are {}", some.join(" and ")),
    };
    refused(format!(
        "no point fits a database at {position:?}; {near}. `coldspare points` lists all, --to NUMBER takes one of them; if nothing was pushed \
         after the last one, promote without --database-position"
    ))
}

fn described(point: &Value) -> String {
    let position = point["position"].as_str().map(|at| format!(", position {at}")).unwrap_or_default();
    format!("point {} (as of {}{position})", point["point"], point["as_of"].as_str().unwrap_or_default())
}

/// What [`Aim::to_json`] says, for people.
pub(super) fn lines(given_up: &Value) -> Vec<String> {
    let list = |name: &str| given_up[name].as_array().map_or(&[][..], Vec::as_slice);
    let position = given_up["position"].as_str().map(|at| format!(", where the database stood at {at}")).unwrap_or_default();
    let mut out = vec![format!("promoted to point {}{position}", given_up["to"])];
    let mut add = |what: &str, all: Vec<String>| {
        out.push(format!("{what}: {}", if all.is_empty() { "none".into() } else { all.len().to_string() }));
        out.extend(all.iter().take(SHOWN_MAX).map(|one| format!("  {one}")));
        if all.len() > SHOWN_MAX {
            out.push(format!("  and {} more: --json lists all of them", all.len() - SHOWN_MAX));
        }
    };
    add("later points that are given up", list("points").iter().map(described).collect());
    add("repositories that had more", list("repositories").iter().map(|one| one["path"].as_str().unwrap_or_default().into()).collect());
    for folder in list("quarantine") {
        out.push(format!("what they had is in {}", folder.as_str().unwrap_or_default()));
    }
    out
}
