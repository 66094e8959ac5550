//! What a forward pass leaves, and the way back through it.

use std::ops::Range;
use std::sync::Arc;

use kernels::{BlockAdapter, GroupSaved, LAYERS, Masks, PairGradients, Pass, Saved, Stream};

use super::group::Group;
use super::{Backward, Gradients, Inner, Lora, Matrix, NativeStage};

/// What a forward pass has left of one micro-batch.
pub struct Pending {
    pub(super) recorded: Arc<Recorded>,
    pub(super) groups: Range<usize>,
    /// The input is a residual stream, whose gradient somebody waits for.
    pub(super) input_gradient: bool,
}

/// A forward pass over one or several groups of rows, each with its adapter.
pub(super) struct Recorded {
    pub stage: NativeStage,
    pub pass: Pass,
    pub groups: Vec<Group>,
    pub saved: Vec<Saved>,
}

/// Of a block's layers, those that have an adapter.
type LayerGradients = [Option<PairGradients>; LAYERS];

impl Pending {
    /// `[rows, columns]` of the output.
    pub fn shape(&self) -> [usize; 2] {
        [self.recorded.rows(&self.groups), self.recorded.stage.0.config.width]
    }

    fn lora(&self) -> &Lora {
        &self.recorded.groups[self.groups.start].lora
    }

    /// For the gradients of several outputs, in as few passes as the adapters' ranks allow.
    pub fn backward_together(all: Vec<(Self, Matrix)>) -> Vec<Backward> {
        let Some((first, _)) = all.first() else { return Vec::new() };
        let stage = first.recorded.stage.clone();
        let loras: Vec<Lora> = all.iter().map(|(pending, _)| pending.lora().clone()).collect();
        let all: Vec<_> = all.into_iter().zip(&loras).collect();
        stage.together(
            all,
            |(_, lora)| lora,
            |some| {
                let gradients: Vec<&[f32]> = some.iter().map(|((_, gradient), _)| gradient.values()).collect();
                let gradient = Stream::new(&stage.0.engine, &gradients.concat());
                Self::backward_alike(some.into_iter().map(|((pending, _), _)| pending).collect(), gradient)
            },
        )
    }

    fn backward_alike(all: Vec<Self>, gradient: Stream) -> Vec<Backward> {
        let (stage, input_gradient) = (all[0].recorded.stage.clone(), all[0].input_gradient);
        let counts: Vec<usize> = all.iter().map(|pending| pending.groups.len()).collect();
        let first = &all[0].recorded;
        let of_one_pass = all.iter().all(|pending| Arc::ptr_eq(&pending.recorded, first));
        if of_one_pass && all.iter().flat_map(|pending| pending.groups.clone()).eq(0..first.groups.len()) {
            // Nobody else has a share in the pass, so that its memory is given back on the way.
            let last = all.into_iter().next_back().expect("there is a first one");
            if let Some(recorded) = Arc::into_inner(last.recorded) {
                return recorded.backward(&counts, gradient, input_gradient);
            }
            unreachable!("every group of the pass was here, and each once");
        }
        let each: Vec<(&Recorded, usize)> =
            all.iter().flat_map(|pending| pending.groups.clone().map(|group| (&*pending.recorded, group))).collect();
        let groups: Vec<Group> = each.iter().map(|&(recorded, group)| recorded.groups[group].clone()).collect();
        let gathered = |block: usize| {
            let each = each.iter().map(|&(recorded, group)| GroupSaved {
                saved: &recorded.saved[block],
                pass: &recorded.pass,
                group,
            });
            Saved::gathered(&stage.0.engine, &each.collect::<Vec<_>>())
        };
        let pass = stage.pass(&groups);
        stage.backward(&pass, &groups, &counts, gathered, gradient, input_gradient)
    }
}

impl Recorded {
    pub fn rows(&self, groups: &Range<usize>) -> usize {
        self.groups[groups.clone()].iter().map(Group::rows).sum()
    }

    /// What each micro-batch gets; `counts` says how many groups are its.
    pub fn backward(self, counts: &[usize], gradient: Stream, input_gradient: bool) -> Vec<Backward> {
        let Self { stage, pass, groups, mut saved } = self;
        let of_block = |_| saved.pop().expect("one for every block");
        stage.backward(&pass, &groups, counts, of_block, gradient, input_gradient)
    }
}

impl NativeStage {
    /// All blocks backwards, what each micro-batch of `counts` groups gets; `saved` is asked for each block, from the last
    /// one on.
    fn backward(
        &self,
        pass: &Pass,
        groups: &[Group],
        counts: &[usize],
        mut saved: impl FnMut(usize) -> Saved,
        gradient: Stream,
        input_gradient: bool,
    ) -> Vec<Backward> {
        let Inner { engine, blocks, .. } = &*self.0;
        let trains = groups[0].lora.0.trains;
        // By micro-batch, from the last block on.
        let mut of_blocks: Vec<Vec<_>> = counts.iter().map(|_| Vec::with_capacity(blocks.len())).collect();
        let mut stream = Some(gradient);
        for (i, block) in blocks.iter().enumerate().rev() {
            let mask = self.masks(groups, i);
            let masks: Option<Masks<'_>> = if groups.iter().any(Group::drops) { Some(&mask) } else { None };
            let adapters: Vec<&BlockAdapter> = groups.iter().map(|group| &group.lora.0.blocks[i]).collect();
            let gradient = stream.take().expect("every block but the first yields one");
            let wanted = i > 0 || input_gradient;
            let (input, gradients) = block.backward(engine, pass, saved(i), gradient, &adapters, trains, masks, wanted);
            let mut gradients = gradients.into_iter();
            for (of_blocks, &count) in of_blocks.iter_mut().zip(counts) {
                of_blocks.push(summed(gradients.by_ref().take(count)));
            }
            stream = input;
        }
        let mut rest = groups;
        let sizes = counts.iter().map(|&count| {
            let (some, behind) = rest.split_at(count);
            rest = behind;
            some.iter().map(Group::rows).sum()
        });
        let inputs = stream.filter(|_| input_gradient).map(|stream| self.matrices(&stream, sizes));
        let mut inputs = inputs.into_iter().flatten();
        let of_one = |of_blocks: Vec<LayerGradients>| {
            let pairs = of_blocks.into_iter().rev().flatten().flatten();
            let adapter = Gradients::new(pairs.flat_map(|pair: PairGradients| [pair.a, pair.b]).collect());
            Backward { input: inputs.next(), adapter }
        };
        of_blocks.into_iter().map(of_one).collect()
    }
}

/// What the groups of one micro-batch add up to, in their order.
fn summed(mut groups: impl Iterator<Item = LayerGradients>) -> LayerGradients {
    let mut all = groups.next().expect("a micro-batch has at least one group");
    for group in groups {
        for (all, one) in all.iter_mut().flatten().zip(group.into_iter().flatten()) {
            all.a.iter_mut().zip(one.a).for_each(|(all, one)| *all += one);
            all.b.iter_mut().zip(one.b).for_each(|(all, one)| *all += one);
        }
    }
    all
}
