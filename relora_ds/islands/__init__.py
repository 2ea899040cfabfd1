"""The link between islands: DeepSpeed jobs that train by themselves for a round, and then exchange their updates.

One server relays the updates and decides which islands a round consists of; each rank of each island is its client. The
server computes nothing on tensors, and neither it nor a client needs torch.
"""
