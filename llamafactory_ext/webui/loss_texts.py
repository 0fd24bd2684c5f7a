"""What the board says of each loss of the package, in each of its languages."""

from __future__ import annotations

from .texts import in_language

LOSSES: dict[str, dict[str, str]] = {
    "en": {
        "sigmoid": "DPO: widens the margin between the chosen and the rejected response without limit.",
        "hinge": "SLiC: like DPO, but ignores a pair once its margin reaches 1/beta.",
        "ipo": "IPO: moves the margin per token towards 1/(2 beta), so that it cannot grow without limit.",
        "kto_pair": "Pairwise KTO: compares each response with the batch's mean divergence from the reference.",
        "orpo": "ORPO: fine-tuning plus an odds-ratio term. It needs no reference model.",
        "simpo": "SimPO: compares likelihoods per token, with a target margin. It needs no reference model.",
        "minor_dpo": "MinorDPO: lowers a rejected response only while it is more likely than under the reference.",
        "dpop": "DPO-Positive: DPO with a penalty when the chosen response is less likely than under the reference.",
        "sr_dpo": "Sr-DPO: DPO whose target margin the model refines by judging both responses under a quality prompt.",
        "sr_ipo": "Sr-IPO: IPO whose target margin the model refines by judging both responses under a quality prompt.",
        "robust": "Robust DPO: DPO without the bias of swapped labels, whose share label smoothing sets.",
        "sigmoid_norm": "Length-normalized DPO: DPO on means per token, so that length does not count.",
        "exo_pair": "EXO: minimizes the reverse KL divergence from the preference; DPO minimizes the forward one.",
        "pl_dpo": "Plackett-Luce DPO: raises the likelihood of the ranking of all responses. Of two, it is DPO.",
        "aot": "AOT: raises the sorted margins of a batch above the reference's. It needs several pairs in a batch.",
        "aot_unpaired": (
            "Unpaired AOT: raises chosen above rejected responses by rank. It needs several pairs in a batch."
        ),
        "nca_pair": "NCA: lowers the rejected response, and keeps the chosen one from falling below the reference.",
        "bco_pair": "BCO: classifies each response by itself as chosen or rejected, with its reward as the logit.",
        "sppo_hard": "SPPO: moves the chosen response's log-ratio to 1/(2 beta), the rejected one's to -1/(2 beta).",
        "apo_zero": "APO-zero: raises chosen, lowers rejected responses. For chosen ones better than the model's own.",
        "apo_down": "APO-down: lowers both responses, the rejected more. For chosen ones worse than the model's own.",
        "sft": "SFT: supervised fine-tuning on the chosen responses. It needs no reference model.",
        "odpo": "ODPO: DPO whose margin must exceed an offset, which grows with the difference of the data's scores.",
        "cringe": "Pairwise CRINGE: SFT plus a contrast of rejected tokens with the model's top ones, gated by margin.",
        "rrhf": "RRHF: SFT plus a hinge on the likelihoods per token. It needs no reference model.",
        "squared_po": "SquaredPO: f-DPO with f(t) = (log t)^2 / 2. It resists falling chosen probabilities.",
        "minor_sft": "MinorSFT: SFT whose force fades as the response becomes more likely than under the reference.",
        "discopop": "DiscoPOP: blends DPO's logistic loss with an exponential one, by the size of the margin.",
    },
    "ru": {
        "sigmoid": "DPO: неограниченно увеличивает отрыв выбранного ответа от отвергнутого.",
        "hinge": "SLiC: как DPO, но не учитывает пару, когда её отрыв достиг 1/beta.",
        "ipo": "IPO: приближает отрыв на токен к 1/(2 beta), чтобы он не рос без предела.",
        "kto_pair": "Парный KTO: сравнивает каждый ответ со средним расхождением пакета с эталонной моделью.",
        "orpo": "ORPO: дообучение с членом отношения шансов. Эталонная модель не нужна.",
        "simpo": "SimPO: сравнивает правдоподобия на токен с целевым отрывом. Эталонная модель не нужна.",
        "minor_dpo": "MinorDPO: понижает отвергнутый ответ, только пока он вероятнее, чем у эталонной модели.",
        "dpop": "DPO-Positive: DPO со штрафом за выбранные ответы, ставшие менее вероятными, чем у эталонной модели.",
        "sr_dpo": "Sr-DPO: DPO, где целевой отрыв уточняет сама модель, оценивая оба ответа при запросе качества.",
        "sr_ipo": "Sr-IPO: IPO, где целевой отрыв уточняет сама модель, оценивая оба ответа при запросе качества.",
        "robust": "Робастный DPO: DPO без смещения от перепутанных ответов, долю которых задаёт сглаживание меток.",
        "sigmoid_norm": "DPO с нормировкой по длине: DPO на средних по токенам, чтобы длина ответа не влияла.",
        "exo_pair": "EXO: минимизирует обратное KL-расхождение с предпочтением пары, а не прямое, как DPO.",
        "pl_dpo": "DPO Плакетта — Льюса: повышает правдоподобие порядка всех ответов на запрос. При двух это DPO.",
        "aot": "AOT: поднимает упорядоченные отрывы пакета над отрывами эталона. В пакете нужно несколько пар.",
        "aot_unpaired": (
            "Непарный AOT: ставит выбранные ответы выше отвергнутых по рангу. В пакете нужно несколько пар."
        ),
        "nca_pair": "NCA: понижает отвергнутый ответ и не даёт выбранному стать менее вероятным, чем у эталона.",
        "bco_pair": "BCO: относит каждый ответ отдельно к выбранным или отвергнутым; логитом служит его награда.",
        "sppo_hard": (
            "SPPO: приближает логарифм отношения у выбранного ответа к 1/(2 beta), у отвергнутого к -1/(2 beta)."
        ),
        "apo_zero": (
            "APO-zero: повышает выбранный ответ, понижает отвергнутый. Подходит, если выбранный лучше ответов модели."
        ),
        "apo_down": (
            "APO-down: понижает оба ответа, отвергнутый сильнее. Подходит, если выбранный хуже ответов модели."
        ),
        "sft": "SFT: дообучение с учителем на выбранных ответах. Эталонная модель не нужна.",
        "odpo": "ODPO: DPO, где отрыв должен превысить сдвиг, растущий с разностью оценок из данных.",
        "cringe": "Парный CRINGE: SFT и контраст отвергнутых токенов с вероятнейшими у модели, включаемые отрывом.",
        "rrhf": "RRHF: SFT и кусочно-линейный штраф на правдоподобиях на токен. Эталонная модель не нужна.",
        "squared_po": "SquaredPO: f-DPO с f(t) = (log t)^2 / 2, противится падению вероятностей выбранных ответов.",
        "minor_sft": "MinorSFT: SFT, сила которого слабеет, когда ответ становится вероятнее, чем у эталонной модели.",
        "discopop": "DiscoPOP: смешивает логистическую функцию потерь DPO с экспоненциальной по величине отрыва.",
    },
    "zh": {
        "sigmoid": "DPO：不断拉大被选回答与被拒回答之间的间隔，没有上限。",
        "hinge": "SLiC：类似 DPO，但间隔达到 1/beta 后忽略该样本对。",
        "ipo": "IPO：使每个词元的间隔趋近 1/(2 beta)，避免无限增大。",
        "kto_pair": "成对 KTO：把每个回答与批内相对参考模型的平均散度比较。",
        "orpo": "ORPO：微调加几率比项。不需要参考模型。",
        "simpo": "SimPO：比较每个词元的似然，并设目标间隔。不需要参考模型。",
        "minor_dpo": "MinorDPO：仅当被拒回答的概率高于参考模型时才压低它。",
        "dpop": "DPO-Positive：在 DPO 上惩罚概率低于参考模型的被选回答。",
        "sr_dpo": "Sr-DPO：模型在质量提示下评判两个回答，以修正 DPO 的目标间隔。",
        "sr_ipo": "Sr-IPO：模型在质量提示下评判两个回答，以修正 IPO 的目标间隔。",
        "robust": "稳健 DPO：消除标注颠倒所致偏差的 DPO，颠倒比例由标签平滑设定。",
        "sigmoid_norm": "长度归一化 DPO：在每个词元的平均值上做 DPO，使回答长度不产生影响。",
        "exo_pair": "EXO：最小化与样本对偏好的反向 KL 散度，而不是像 DPO 那样的正向 KL 散度。",
        "pl_dpo": "Plackett-Luce DPO：提高同一问题全部回答的排序的似然。只有两个回答时就是 DPO。",
        "aot": "AOT：把批内排序后的间隔抬到参考模型的间隔之上。每批需要多个样本对。",
        "aot_unpaired": "非成对 AOT：按排名把被选回答抬到被拒回答之上。每批需要多个样本对。",
        "nca_pair": "NCA：压低被拒回答，并防止被选回答的概率低于参考模型。",
        "bco_pair": "BCO：以奖励为 logit，分别判断每个回答是被选还是被拒。",
        "sppo_hard": "SPPO：使被选回答的对数概率比趋近 1/(2 beta)，被拒回答的趋近 -1/(2 beta)。",
        "apo_zero": "APO-zero：抬高被选回答，压低被拒回答。适用于被选回答优于模型自身回答的情形。",
        "apo_down": "APO-down：压低两个回答，被拒回答压得更多。适用于被选回答不如模型自身回答的情形。",
        "sft": "SFT：在被选回答上做监督微调。不需要参考模型。",
        "odpo": "ODPO：间隔须超过偏移量的 DPO，偏移量随数据评分之差增大。",
        "cringe": "成对 CRINGE：SFT 加上被拒词元与模型自身高概率词元的对比，二者由间隔软门控。",
        "rrhf": "RRHF：SFT 加每个词元似然的合页损失。不需要参考模型。",
        "squared_po": "SquaredPO：取 f(t) = (log t)^2 / 2 的 f-DPO，可抑制被选回答的概率下降。",
        "minor_sft": "MinorSFT：回答的概率超过参考模型越多，作用力越弱的 SFT。",
        "discopop": "DiscoPOP：按间隔大小混合 DPO 的逻辑斯谛损失与指数损失。",
    },
    "ko": {
        "sigmoid": "DPO: 선택된 응답과 거부된 응답의 마진을 제한 없이 넓힙니다.",
        "hinge": "SLiC: DPO와 같지만 마진이 1/beta에 이른 쌍은 무시합니다.",
        "ipo": "IPO: 토큰당 마진을 1/(2 beta)에 가깝게 하여 무한히 커지지 않게 합니다.",
        "kto_pair": "쌍 단위 KTO: 각 응답을 참조 모델에 대한 배치의 평균 발산과 비교합니다.",
        "orpo": "ORPO: 미세 조정에 오즈비 항을 더합니다. 참조 모델이 필요 없습니다.",
        "simpo": "SimPO: 목표 마진을 두고 토큰당 우도를 비교합니다. 참조 모델이 필요 없습니다.",
        "minor_dpo": "MinorDPO: 거부된 응답의 확률이 참조 모델보다 높을 때만 낮춥니다.",
        "dpop": "DPO-Positive: 선택된 응답의 확률이 참조 모델보다 낮아지면 페널티를 주는 DPO.",
        "sr_dpo": "Sr-DPO: 모델이 품질 프롬프트에서 두 응답을 평가해 DPO의 목표 마진을 다듬습니다.",
        "sr_ipo": "Sr-IPO: 모델이 품질 프롬프트에서 두 응답을 평가해 IPO의 목표 마진을 다듬습니다.",
        "robust": "강건한 DPO: 뒤바뀐 레이블이 만드는 편향을 없앤 DPO. 그 비율은 레이블 스무딩으로 정합니다.",
        "sigmoid_norm": "길이 정규화 DPO: 토큰 평균으로 계산하여 길이의 영향을 없앤 DPO.",
        "exo_pair": "EXO: 쌍의 선호에 대한 역방향 KL 발산을 최소화합니다. DPO는 순방향을 최소화합니다.",
        "pl_dpo": "Plackett-Luce DPO: 한 질문에 대한 모든 응답의 순위의 우도를 높입니다. 응답이 둘이면 DPO입니다.",
        "aot": "AOT: 배치의 정렬된 마진을 참조 모델의 마진보다 높입니다. 배치에 여러 쌍이 필요합니다.",
        "aot_unpaired": "비쌍 AOT: 순위별로 선택된 응답을 거부된 응답보다 높입니다. 배치에 여러 쌍이 필요합니다.",
        "nca_pair": "NCA: 거부된 응답을 낮추고, 선택된 응답의 확률이 참조 모델보다 낮아지지 않게 합니다.",
        "bco_pair": "BCO: 보상을 로짓으로 하여 각 응답을 따로 선택 또는 거부로 분류합니다.",
        "sppo_hard": "SPPO: 로그 확률비를 선택된 응답은 1/(2 beta), 거부된 응답은 -1/(2 beta)에 가깝게 합니다.",
        "apo_zero": (
            "APO-zero: 선택된 응답을 높이고 거부된 응답을 낮춥니다. 선택된 응답이 모델의 응답보다 나을 때 씁니다."
        ),
        "apo_down": (
            "APO-down: 두 응답을 낮추되 거부된 응답을 더 낮춥니다. 선택된 응답이 모델의 응답보다 못할 때 씁니다."
        ),
        "sft": "SFT: 선택된 응답으로 지도 미세 조정을 합니다. 참조 모델이 필요 없습니다.",
        "odpo": "ODPO: 마진이 오프셋을 넘어야 하는 DPO. 오프셋은 데이터의 점수 차이에 따라 커집니다.",
        "cringe": "쌍 단위 CRINGE: SFT에 거부된 토큰과 모델의 상위 토큰의 대비를 더하고, 마진으로 켜고 끕니다.",
        "rrhf": "RRHF: SFT에 토큰당 우도의 힌지 로스를 더합니다. 참조 모델이 필요 없습니다.",
        "squared_po": "SquaredPO: f(t) = (log t)^2 / 2인 f-DPO. 선택된 응답의 확률이 떨어지는 것을 억제합니다.",
        "minor_sft": "MinorSFT: 응답의 확률이 참조 모델보다 높아질수록 힘이 약해지는 SFT.",
        "discopop": "DiscoPOP: 마진의 크기에 따라 DPO의 로지스틱 로스와 지수 로스를 섞습니다.",
    },
    "ja": {
        "sigmoid": "DPO：選ばれた応答と拒否された応答のマージンを際限なく広げます。",
        "hinge": "SLiC：DPO と同様ですが、マージンが 1/beta に達したペアを無視します。",
        "ipo": "IPO：トークンあたりのマージンを 1/(2 beta) に近づけ、際限なく大きくならないようにします。",
        "kto_pair": "ペア単位の KTO：各応答を、参照モデルに対するバッチの平均ダイバージェンスと比べます。",
        "orpo": "ORPO：ファインチューニングにオッズ比の項を加えます。参照モデルは不要です。",
        "simpo": "SimPO：目標マージンを置いてトークンあたりの尤度を比べます。参照モデルは不要です。",
        "minor_dpo": "MinorDPO：拒否された応答の確率が参照モデルより高い間だけ下げます。",
        "dpop": "DPO-Positive：選ばれた応答の確率が参照モデルを下回るとペナルティを加える DPO。",
        "sr_dpo": "Sr-DPO：モデルが品質プロンプトで両方の応答を評価し、DPO の目標マージンを調整します。",
        "sr_ipo": "Sr-IPO：モデルが品質プロンプトで両方の応答を評価し、IPO の目標マージンを調整します。",
        "robust": "ロバスト DPO：逆のラベルによる偏りを除いた DPO。その割合はラベルスムージングで決まります。",
        "sigmoid_norm": "長さを正規化した DPO：トークンの平均で計算し、長さの影響を除きます。",
        "exo_pair": "EXO：ペアの選好に対する逆方向の KL ダイバージェンスを最小化します。DPO は順方向を最小化します。",
        "pl_dpo": "Plackett-Luce DPO：一つの質問への全応答の順位の尤度を高めます。応答が二つなら DPO と同じです。",
        "aot": "AOT：バッチの並べ替えたマージンを参照モデルのマージンより高くします。バッチに複数のペアが必要です。",
        "aot_unpaired": (
            "非ペアの AOT：順位ごとに、選ばれた応答を拒否された応答より高くします。バッチに複数のペアが必要です。"
        ),
        "nca_pair": "NCA：拒否された応答を下げ、選ばれた応答の確率が参照モデルを下回らないようにします。",
        "bco_pair": "BCO：報酬をロジットとして、各応答を個別に、選ばれたものか拒否されたものかに分類します。",
        "sppo_hard": "SPPO：対数確率比を、選ばれた応答では 1/(2 beta)、拒否された応答では -1/(2 beta) に近づけます。",
        "apo_zero": (
            "APO-zero：選ばれた応答を上げ、拒否された応答を下げます。選ばれた応答がモデルの応答に勝る場合に使います。"
        ),
        "apo_down": (
            "APO-down：両方の応答を、拒否された応答をより大きく下げます。"
            "選ばれた応答がモデルの応答に劣る場合に使います。"
        ),
        "sft": "SFT：選ばれた応答で教師ありファインチューニングを行います。参照モデルは不要です。",
        "odpo": "ODPO：マージンがオフセットを超えることを求める DPO。オフセットはデータのスコアの差とともに増えます。",
        "cringe": "ペア単位の CRINGE：SFT に、拒否されたトークンと上位トークンの対比を加え、マージンで切り替えます。",
        "rrhf": "RRHF：SFT にトークンあたりの尤度のヒンジ損失を加えます。参照モデルは不要です。",
        "squared_po": "SquaredPO：f(t) = (log t)^2 / 2 の f-DPO。選ばれた応答の確率の低下を抑えます。",
        "minor_sft": "MinorSFT：応答の確率が参照モデルを上回るにつれて力が弱まる SFT。",
        "discopop": "DiscoPOP：マージンの大きさに応じて、DPO のロジスティック損失と指数損失を混ぜ合わせます。",
    },
}


def about_loss(name: str, lang: str) -> str | None:
    """What a loss of the package does; None for a user's."""
    return in_language(lang, LOSSES).get(name)
