//! What is ready is computed together, and everybody is answered.

use experiment::{Seed, Strategy};
use model::ModelError;
use model::stage::{Dropout, Input, Pending, Recording};

use super::{Backward, BackwardJob, BodyError, ForwardJob, PASS_TOKENS_MAX, Place, Ready, Worker};

impl Worker {
    pub(super) fn make_room(&mut self, tokens: usize) {
        if self.ready.tokens > 0 && self.ready.tokens + tokens > PASS_TOKENS_MAX {
            self.compute();
        }
        self.ready.tokens += tokens;
    }

    /// Computes what is ready, and answers.
    pub(super) fn compute(&mut self) {
        let Ready { mut evaluated, mut recorded, mut backward, .. } = std::mem::take(&mut self.ready);
        // Whoever went forwards together is found to come back together.
        let name = |job: &ForwardJob| job.place.participant.clone();
        evaluated.sort_by_key(name);
        recorded.sort_by_key(name);
        backward.sort_by_key(|(job, _)| job.place.participant.clone());
        if !evaluated.is_empty() {
            self.evaluate(evaluated);
        }
        if !recorded.is_empty() {
            self.record(recorded);
        }
        if !backward.is_empty() {
            self.go_back(backward);
        }
    }

    fn evaluate(&mut self, jobs: Vec<ForwardJob>) {
        let Some(round) = &self.round else { return };
        let (x, others): (Vec<_>, Vec<_>) = jobs.into_iter().map(|job| (job.x, (job.segments, job.reply))).unzip();
        let passes = x.into_iter().zip(&others).map(|(x, (segments, _))| (x, segments, &round.global_lora)).collect();
        let answers = each(self.stage.forward_together(passes), others.len());
        for ((_, reply), answer) in others.into_iter().zip(answers) {
            drop(reply.send(answer));
        }
    }

    fn record(&mut self, jobs: Vec<ForwardJob>) {
        let Some(round) = self.round.as_mut() else { return };
        let mut others = Vec::new();
        let mut inputs = Vec::new();
        for ForwardJob { place, segments, x, reply, .. } in jobs {
            let label = format!("dropout/{}/{}/{}", place.participant, place.step, place.micro);
            let dropout = Dropout { seed: Seed(self.experiment.seed).bytes(&label) };
            inputs.push(Input::Activations(x));
            others.push((place, segments, dropout, reply));
        }
        let recordings = inputs.into_iter().zip(&others).map(|(input, (place, segments, dropout, _))| Recording {
            input,
            segments,
            lora: round.lora_of(place),
            dropout,
        });
        let answers = each(self.stage.forward_recorded_together(recordings.collect()), others.len());
        for ((place, _, _, reply), answer) in others.into_iter().zip(answers) {
            let answer = answer.map(|(y, pending)| {
                round.pending.insert(place.pass(), Some(pending));
                y
            });
            drop(reply.send(answer));
        }
    }

    /// Every waiting job is asked again: whose turn has still not come waits on.
    pub(super) fn retry_waiting(&mut self) {
        let waiting = self.round.as_mut().map(|round| std::mem::take(&mut round.waiting)).unwrap_or_default();
        for job in waiting {
            // A stream that is gone wants no answer, and must not leave a recorded pass behind.
            if !job.reply.is_closed() {
                self.forward(job);
            }
        }
    }

    fn go_back(&mut self, jobs: Vec<(BackwardJob, Pending)>) {
        let (mut passes, mut others) = (Vec::new(), Vec::new());
        for (BackwardJob { place, gradient, reply }, pending) in jobs {
            passes.push((pending, gradient));
            others.push((place, reply));
        }
        let answers = each(Pending::backward_together(passes), others.len());
        for ((place, reply), answer) in others.into_iter().zip(answers) {
            drop(reply.send(answer.and_then(|backward| self.take_gradients(&place, backward))));
        }
    }

    /// Adds a micro-batch's gradients to those of its step.
    fn take_gradients(&mut self, place: &Place, backward: model::stage::Backward) -> Result<Backward, BodyError> {
        let round = self.round.as_mut().ok_or(BodyError::Stale)?;
        let adapter = &round.global;
        let member = round.members.get_mut(&place.participant).ok_or(BodyError::Stale)?;
        // A step that is repeated has sums of its own.
        let (sum, micros_done, owes_commit, own) = match &mut member.again {
            Some(again) if again.step == place.step => {
                (&mut again.sum, &mut again.micros_done, &mut again.owes_commit, member.before.as_ref())
            }
            _ => {
                let own = member.own.as_ref().map(|(own, _)| own);
                (&mut member.sum, &mut member.micros_done, &mut member.owes_commit, own)
            }
        };
        match &mut *sum {
            Some(sum) => sum.add(&backward.adapter),
            none => *none = Some(backward.adapter),
        }
        *micros_done += 1;
        let mut squared_norms = None;
        if *micros_done == place.micros {
            *owes_commit = true;
            let sum = sum.as_mut().expect("the sum of at least this micro-batch");
            if let (Strategy::FedProx { mu }, Some(own)) = (&self.experiment.federation.strategy, own) {
                sum.add_proximal(*mu as f32, own, adapter);
            }
            let norms = sum.squared_norms(adapter);
            // Squares of moments are kept in f32, where no later step brings back one that is infinite.
            let most = f64::from(wire::limits::VALUE_MAX).powi(2);
            if norms.iter().any(|norm| norm.is_nan() || *norm > most) {
                return Err(BodyError::Misplaced("the gradients it sent make the body's overflow".into()));
            }
            squared_norms = Some(norms);
        }
        let gradient = backward.input.expect("a body's input is tracked");
        Ok(Backward { gradient, squared_norms })
    }
}

/// What a pass over several gave each of them. Their shapes were checked one by one, so that a failure is everyone's.
fn each<T>(together: Result<Vec<T>, ModelError>, count: usize) -> Vec<Result<T, BodyError>> {
    match together {
        Ok(all) => all.into_iter().map(Ok).collect(),
        Err(error) => {
            let error = error.to_string();
            (0..count).map(|_| Err(ModelError::Mismatch(error.clone()).into())).collect()
        }
    }
}
